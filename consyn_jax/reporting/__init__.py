"""`consyn-report`: read runs from their directories and compare them side by side."""
