"""A step as data: plans, the schedules that build them, and what reads them."""
