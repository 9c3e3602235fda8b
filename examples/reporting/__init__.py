"""What the folders of many runs say together: tables, charts and the pages that hold them."""
