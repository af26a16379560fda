"""The table of tools and kinds of variant, which `doctor` reads."""
