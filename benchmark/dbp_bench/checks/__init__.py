"""What a defense, its gradient and an installation must satisfy."""
