CREATE TABLE authors (id INTEGER PRIMARY KEY, name TEXT, country TEXT, born INTEGER);
CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT, author_id INTEGER REFERENCES authors(id), year INTEGER, pages INTEGER);
CREATE TABLE members (id INTEGER PRIMARY KEY, name TEXT, joined TEXT);
CREATE TABLE loans (id INTEGER PRIMARY KEY, book_id INTEGER REFERENCES books(id), member_id INTEGER REFERENCES members(id), lent TEXT, returned TEXT);

INSERT INTO authors VALUES
  (1, 'Mara Lind', 'Norway', 1951), (2, 'Tomas Reyes', 'Chile', 1968), (3, 'Aiko Mori', 'Japan', 1975),
  (4, 'Paul Okoro', 'Nigeria', 1980), (5, 'Ida Berg', 'Norway', 1990);
INSERT INTO books VALUES
  (1, 'The Cold Harbour', 1, 1984, 312), (2, 'Salt and Light', 1, 1992, 268), (3, 'Nine Rivers', 2, 1999, 421),
  (4, 'A Map of Rain', 3, 2004, 198), (5, 'The Paper Garden', 3, 2010, 354), (6, 'Market Day', 4, 2012, 240),
  (7, 'The Last Ferry', 1, 2012, 287), (8, 'Letters Home', 4, 2018, 176);
INSERT INTO members VALUES
  (1, 'Ben', '2019-03-01'), (2, 'Clara', '2020-07-15'), (3, 'Dev', '2020-11-30'), (4, 'Elsa', '2022-01-10');
INSERT INTO loans VALUES
  (1, 1, 1, '2023-01-05', '2023-01-25'), (2, 3, 1, '2023-02-01', NULL), (3, 4, 2, '2023-02-03', '2023-02-20'),
  (4, 5, 2, '2023-03-11', '2023-04-02'), (5, 1, 3, '2023-03-15', '2023-03-30'), (6, 8, 2, '2023-04-05', NULL),
  (7, 1, 2, '2023-05-01', '2023-05-09');
