"""Where the .mat and finished sets come from and go to: this disk, a mounted Google Drive, a web server."""
