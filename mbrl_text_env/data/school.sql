CREATE TABLE students (id INTEGER PRIMARY KEY, name TEXT, year INTEGER, town TEXT);
CREATE TABLE teachers (id INTEGER PRIMARY KEY, name TEXT, room TEXT);
CREATE TABLE courses (id INTEGER PRIMARY KEY, title TEXT, teacher_id INTEGER REFERENCES teachers(id), hours INTEGER);
CREATE TABLE grades (student_id INTEGER REFERENCES students(id), course_id INTEGER REFERENCES courses(id), grade INTEGER);

INSERT INTO students VALUES
  (1, 'Alma', 1, 'Riva'), (2, 'Bruno', 1, 'Riva'), (3, 'Cleo', 2, 'Monte'), (4, 'Dario', 2, 'Riva'), (5, 'Edda', 3, 'Monte'), (6, 'Falk', 3, NULL);
INSERT INTO teachers VALUES (1, 'Ms Hart', 'B12'), (2, 'Mr Sousa', 'A03'), (3, 'Ms Klein', 'B07');
INSERT INTO courses VALUES (1, 'algebra', 1, 4), (2, 'biology', 2, 3), (3, 'history', 3, 2), (4, 'geometry', 1, 3), (5, 'music', NULL, 1);
INSERT INTO grades VALUES
  (1, 1, 85), (1, 2, 78), (2, 1, 62), (2, 3, 71), (3, 1, 93), (3, 4, 90), (4, 2, 55), (4, 3, 80), (5, 4, 74), (5, 2, 88), (5, 3, 69);
