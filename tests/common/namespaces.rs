//! Nodes in network namespaces of their own, joined by a bridge in a further one, so that links can be cut.
//!
//! Only the network is separate: processes enter with `nsenter --net=`, because entering with `ip netns exec` copies
//! the mount table and keeps unmounted filesystems alive in the copy.

use std::process::Command;

pub struct Namespaces {
    prefix: String,
    nodes: usize,
}

impl Namespaces {
    pub fn make(nodes: usize) -> Namespaces {
        let made = Namespaces { prefix: format!("mx{}", std::process::id()), nodes };
        let hub = made.hub();
        ip(&["netns", "add", &hub]);
        ip(&["-n", &hub, "link", "add", "br0", "type", "bridge"]);
        ip(&["-n", &hub, "link", "set", "br0", "up"]);
        for n in 0..nodes {
            let (name, port, end) = (made.name(n), made.port(n), format!("e{n}"));
            ip(&["netns", "add", &name]);
            ip(&["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", &end, "netns", &name]);
            ip(&["-n", &hub, "link", "set", &port, "master", "br0", "up"]);
            ip(&["-n", &name, "addr", "add", &format!("{}/24", made.address(n)), "dev", &end]);
            ip(&["-n", &name, "link", "set", &end, "up"]);
            ip(&["-n", &name, "link", "set", "lo", "up"]);
        }
        made
    }

    /// The address node `n` is reached at.
    pub fn address(&self, n: usize) -> String {
        format!("10.99.0.{}", n + 1)
    }

    /// A command that runs in node `n`'s network.
    pub fn command(&self, n: usize, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name(n))).arg(program);
        command
    }

    /// Takes node `n` off the network: nothing arrives, nobody is told.
    pub fn cut(&self, n: usize) {
        ip(&["-n", &self.hub(), "link", "set", &self.port(n), "down"]);
    }

    /// Puts node `n` back on the network.
    pub fn heal(&self, n: usize) {
        ip(&["-n", &self.hub(), "link", "set", &self.port(n), "up"]);
    }

    fn hub(&self) -> String {
        format!("{}hub", self.prefix)
    }

    fn name(&self, n: usize) -> String {
        format!("{}n{n}", self.prefix)
    }

    fn port(&self, n: usize) -> String {
        format!("p{n}")
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in (0..self.nodes).map(|n| self.name(n)).chain([self.hub()]) {
            let _ = Command::new("ip").args(["netns", "delete", &name]).output();
        }
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("ip is installed (package iproute2)");
    assert!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
}
