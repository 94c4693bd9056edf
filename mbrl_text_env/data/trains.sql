CREATE TABLE stations (id INTEGER PRIMARY KEY, name TEXT, platforms INTEGER);
CREATE TABLE trains (id INTEGER PRIMARY KEY, number TEXT, kind TEXT, seats INTEGER);
CREATE TABLE stops (train_id INTEGER REFERENCES trains(id), station_id INTEGER REFERENCES stations(id), place INTEGER, arrives TEXT, departs TEXT);

INSERT INTO stations VALUES (1, 'Northgate', 6), (2, 'Ashford', 2), (3, 'Millbrook', 3), (4, 'Seaview', 4), (5, 'Old Quay', 1);
INSERT INTO trains VALUES (1, 'IC 10', 'express', 420), (2, 'R 21', 'regional', 180), (3, 'R 23', 'regional', 160), (4, 'IC 12', 'express', 380), (5, 'N 5', 'night', 240);
INSERT INTO stops VALUES
  (1, 1, 1, NULL, '08:00'), (1, 3, 2, '08:40', '08:43'), (1, 4, 3, '09:25', NULL),
  (2, 1, 1, NULL, '08:10'), (2, 2, 2, '08:25', '08:27'), (2, 3, 3, '09:02', NULL),
  (3, 3, 1, NULL, '09:10'), (3, 4, 2, '10:05', '10:08'), (3, 5, 3, '10:20', NULL),
  (4, 4, 1, NULL, '17:30'), (4, 1, 2, '18:50', NULL),
  (5, 5, 1, NULL, '22:15'), (5, 1, 2, '23:59', NULL);
