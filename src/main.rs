//! The program `caponier`: everything it does is in the library of the same name.

use std::io::{self, Write};
use std::process::ExitCode;

use caponier::cli;

fn main() -> ExitCode {
    match cli::run(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => {
            // With standard error gone there is nobody left to tell; the exit code still does.
            let _ = writeln!(io::stderr(), "caponier: {error:#}");
            cli::exit_code(&error)
        }
    }
}
