"""The page that shows a project in the browser."""
