"""Images and arrays in and out: reading, storing, exporting, drawing."""
