"""The released URSA checkpoint folder and PEFT's adapter folder, read and written."""
