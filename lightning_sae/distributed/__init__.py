"""Several devices: what ranks find out together, and a dictionary split over devices."""
