"""What any program needs of the machine that it runs on: files, pictures as pixels, kept compiled programs."""
