"""What several studies use: settings, sweeps, tuning, frontiers, pages and plots."""
