"""The report of runs: the paper's figures and a page that shows them, made from what runs leave behind."""
