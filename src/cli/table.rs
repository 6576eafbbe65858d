//! Plain tables for people: columns as wide as their widest cell, two blanks between.

/// Lines of `rows` under `head`; empty when there are no rows.
pub(super) fn lines<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> Vec<String> {
    if rows.is_empty() {
        return Vec::new();
    }
    let mut width = head.map(|h| h.chars().count());
    for row in rows {
        for (w, cell) in width.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded: Vec<String> = cells.iter().zip(width).map(|(cell, w)| format!("{cell:<w$}")).collect();
        padded.join("  ").trim_end().to_string()
    };
    let mut out = vec![line(head)];
    out.extend(rows.iter().map(|row| line(row.each_ref().map(String::as_str))));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["n1".to_string(), "yes".to_string()], ["node-12".to_string(), String::new()]];
        assert_eq!(lines(["NODE", "UP"], &rows), ["NODE     UP", "n1       yes", "node-12"]);
        assert!(lines(["A"], &[]).is_empty());
    }
}
