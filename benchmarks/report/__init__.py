"""Result files for people: a script's table, and its chart where it has one."""
