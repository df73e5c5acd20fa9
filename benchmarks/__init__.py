"""What is measured, and what is made outside the package."""
