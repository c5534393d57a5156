mod bounds;
mod rest;
