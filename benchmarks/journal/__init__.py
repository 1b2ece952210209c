"""What a site's journal costs: charges a second, reading it, and bytes a record."""
