"""What is measured of images: by name, each score computed once."""
