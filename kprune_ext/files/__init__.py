"""Writing of files and folders that appear completely or not at all, and figures."""
