"""Pictures from anywhere => square uint8."""
