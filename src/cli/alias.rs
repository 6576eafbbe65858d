//! The names under which mount(8), mkfs(8) and fsck(8) call this binary, translated to its own command line.

use std::ffi::{OsStr, OsString};

use crate::daemon::AS_ARGUMENTS;

/// A helper name of the system's tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alias {
    Mkfs,
    Fsck,
    Mount,
}

impl Alias {
    /// The alias meant by the program's name.
    pub(super) fn of(program: &str) -> Option<Alias> {
        match program {
            "mkfs.mfs" => Some(Alias::Mkfs),
            "fsck.mfs" => Some(Alias::Fsck),
            "mount.mfs" => Some(Alias::Mount),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Alias::Mkfs => "mkfs.mfs",
            Alias::Fsck => "fsck.mfs",
            Alias::Mount => "mount.mfs",
        }
    }

    /// The exit code for wrong usage, as the calling tool's manual defines it.
    pub(super) fn usage_code(self) -> u8 {
        match self {
            Alias::Mkfs | Alias::Mount => 1,
            Alias::Fsck => 16,
        }
    }

    /// The exit code for a command that failed with `code`.
    pub(super) fn failure_code(self, code: u8) -> u8 {
        match self {
            Alias::Mkfs | Alias::Fsck => code,
            Alias::Mount => 32,
        }
    }

    /// The arguments of `matrix` that mean the same; `None` when nothing is to be done (mount -f).
    pub(super) fn translate(self, args: &[OsString]) -> Result<Option<Vec<OsString>>, String> {
        match self {
            Alias::Mkfs => {
                Ok(Some(translate(args, "mkfs", &[("-f", "--force"), ("-L", "--label")], &["-v", "-V"])?))
            }
            Alias::Fsck => {
                Ok(Some(translate(args, "fsck", &[], &["-a", "-p", "-y", "-n", "-f", "-v", "-r", "-T"])?))
            }
            Alias::Mount => translate_mount(args),
        }
    }
}

fn translate(
    args: &[OsString],
    command: &str,
    renamed: &[(&str, &str)],
    dropped: &[&str],
) -> Result<Vec<OsString>, String> {
    let mut out = vec![OsString::from("matrix"), OsString::from(command)];
    for arg in args {
        match renamed.iter().find(|(from, _)| arg == OsStr::new(from)) {
            Some((_, to)) => out.push(OsString::from(to)),
            None if dropped.iter().any(|d| arg == OsStr::new(d)) => {}
            None => out.push(arg.clone()),
        }
    }
    Ok(out)
}

/// `mount.mfs DEVICE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`, as mount(8) calls it.
fn translate_mount(args: &[OsString]) -> Result<Option<Vec<OsString>>, String> {
    let mut out = vec![OsString::from("matrix"), OsString::from("mount")];
    let mut rest = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("-o") => {
                let list = args.next().and_then(|o| o.to_str()).ok_or("-o needs a list of options")?;
                split_options(list, &mut out, &mut rest);
            }
            Some("-t") => drop(args.next()),
            Some("-N") => {
                return Err("mounting into another namespace (-N) is not supported: enter it first".into());
            }
            Some(flags) if flags.len() > 1 && flags.starts_with('-') && !flags.starts_with("--") => {
                if flags.contains('f') {
                    return Ok(None);
                }
                if let Some(unknown) = flags[1..].chars().find(|c| !"snvw".contains(*c)) {
                    return Err(format!("unknown flag -{unknown}"));
                }
            }
            _ => out.push(arg.clone()),
        }
    }
    if !rest.is_empty() {
        out.extend([OsString::from("-o"), OsString::from(rest.join(","))]);
    }
    Ok(Some(out))
}

fn split_options(list: &str, out: &mut Vec<OsString>, rest: &mut Vec<String>) {
    for option in list.split(',').filter(|o| !o.is_empty()) {
        let argument = option.split_once('=').and_then(|(name, value)| {
            AS_ARGUMENTS.iter().find(|(n, _)| *n == name).map(|(_, arg)| (*arg, value))
        });
        match argument {
            Some((argument, value)) => out.extend([OsString::from(argument), OsString::from(value)]),
            None => rest.push(option.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn mount_calls_its_helper_and_gets_our_arguments() {
        let got = Alias::Mount
            .translate(&args("/dev/sdb /mnt -v -n -o rw,node=a,_netdev,fence=lease"))
            .expect("ok");
        assert_eq!(got, Some(args("matrix mount /dev/sdb /mnt --node a -o rw,_netdev,fence=lease")));
    }

    #[test]
    fn a_fake_mount_does_nothing() {
        assert_eq!(Alias::Mount.translate(&args("/dev/sdb /mnt -f")), Ok(None));
    }

    #[test]
    fn mkfs_and_fsck_flags_of_the_system_tools_are_known() {
        let got = Alias::Mkfs.translate(&args("-f -L data /dev/sdb")).expect("ok");
        assert_eq!(got, Some(args("matrix mkfs --force --label data /dev/sdb")));
        let got = Alias::Fsck.translate(&args("-a /dev/sdb")).expect("ok");
        assert_eq!(got, Some(args("matrix fsck /dev/sdb")));
    }
}
