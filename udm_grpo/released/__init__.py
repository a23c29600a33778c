"""Read and write released URSA model folders and PEFT's adapter folders."""
