"""What only the quickstart needs: its texts and the people it stands for (`data`), and how it ends (`report`)."""
