//! Devices, the gate, leases, the quorum register and fencing.
