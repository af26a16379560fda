"""Card templates, shipped as package data. A module so that editable installs find the folder as a subpackage too."""
