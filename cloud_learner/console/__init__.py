"""What people see of a run: the live view in the terminal, the report and its picture."""
