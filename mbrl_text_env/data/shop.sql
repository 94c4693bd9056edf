CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id), day TEXT);
CREATE TABLE items (order_id INTEGER REFERENCES orders(id), product_id INTEGER REFERENCES products(id), amount INTEGER);

INSERT INTO products VALUES
  (1, 'lamp', 'home', 24.5, 12), (2, 'chair', 'home', 79.0, 4), (3, 'notebook', 'office', 3.25, 200),
  (4, 'pen', 'office', 1.5, 340), (5, 'kettle', 'kitchen', 32.0, 0), (6, 'mug', 'kitchen', 6.75, 58), (7, 'pan', 'kitchen', 41.0, 9);
INSERT INTO customers VALUES
  (1, 'Nora', 'Bergen'), (2, 'Omar', 'Lyon'), (3, 'Pia', 'Lyon'), (4, 'Quinn', 'Porto'), (5, 'Rosa', 'Lyon');
INSERT INTO orders VALUES
  (1, 1, '2024-05-01'), (2, 2, '2024-05-01'), (3, 2, '2024-05-03'), (4, 3, '2024-05-04'), (5, 1, '2024-05-09'), (6, 2, '2024-05-11');
INSERT INTO items VALUES
  (1, 1, 2), (1, 6, 4), (2, 3, 10), (2, 4, 20), (3, 2, 1), (4, 7, 1), (4, 6, 2), (5, 4, 5), (6, 1, 1), (6, 3, 4);
