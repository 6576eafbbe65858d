#[allow(dead_code)]
mod interconnect;

fn main() {}
