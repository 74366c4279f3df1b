"""Starting and following Flower from outside; keys, site data, checks of a machine."""
