"""Pictures of what was learnt, and the HTML page that shows them."""
