"""Takes a defense to a leaderboard: it is made, bundled, verified and placed."""
