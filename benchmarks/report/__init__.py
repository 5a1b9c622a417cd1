"""Result files, tables, plots and pages."""
