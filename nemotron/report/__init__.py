"""What runs did, from the files in their folders: an HTML page, a list, a comparison."""
