"""Bytes to and from places: this machine's disks, a mounted Google Drive, a web server.

No store knows a dataset.
"""
