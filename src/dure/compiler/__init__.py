"""The compiler: tensor programs to what a target runs, by an ordered list of passes."""
