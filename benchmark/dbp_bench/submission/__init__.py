"""How a defense gets onto a leaderboard: made, bundled, verified, moved."""
