"""Making datasets: RecordIO packs from folders, lists and archives, their verification and statistics."""
