"""What a run tells: metrics, pictures, its folder and its report."""
