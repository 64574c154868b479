"""What people look at: the description of the API, and the page that shows it."""
