//! FTP as far as a director notices it: a connection on which a client asks for files, and one from the client for each of
//! them, to a port that the server names (RFC 2428, "EPSV").

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    lab::NetNs,
    peers::{self, PATIENCE},
};

/// A server of one client at a time, every file of which is its own number. It ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts the server that calls itself `number` at this address of a namespace. The port on which it offers files is any
    /// that programs are given, so it is not below 1024.
    ///
    /// # Errors
    ///
    /// When the address cannot be had.
    pub fn start(namespace: &NetNs, address: SocketAddr, number: u8) -> Result<Self> {
        let (control, data) =
            namespace.enter(|| anyhow::Ok((TcpListener::bind(address)?, TcpListener::bind((address.ip(), 0))?)))??;
        control.set_nonblocking(true)?;
        data.set_nonblocking(true)?;
        let end = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&end);
        let thread = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                // What goes wrong with a client is the client's to notice.
                let _ = accept(&control, Duration::from_millis(50)).and_then(|client| serve(client, &data, number));
            }
        });
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A server that panicked has failed its clients, who say so.
            let _ = thread.join();
        }
    }
}

/// The next client, if one comes in time.
fn accept(listener: &TcpListener, patience: Duration) -> Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < patience => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn serve(mut client: TcpStream, data: &TcpListener, number: u8) -> Result<()> {
    let mut words = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    write!(client, "220 server {number}\r\n")?;
    loop {
        line.clear();
        if words.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim_end() {
            "EPSV" => write!(client, "229 Entering Extended Passive Mode (|||{}|)\r\n", data.local_addr()?.port())?,
            "RETR number" => {
                write!(client, "150 here it comes\r\n")?;
                accept(data, PATIENCE)?.write_all(&[number])?;
                write!(client, "226 that was it\r\n")?;
            }
            _ => write!(client, "502 not here\r\n")?,
        }
    }
}

/// A client, which is being served.
#[derive(Debug)]
pub struct Client {
    address: IpAddr,
    service: SocketAddr,
    words: BufReader<TcpStream>,
    /// The number of the server.
    pub server: u8,
}

impl Client {
    /// Connects to a service from this address of the client. To be called in the client's namespace.
    ///
    /// # Errors
    ///
    /// When it is not served.
    pub fn connect(address: IpAddr, service: SocketAddr) -> Result<Self> {
        let mut client = Self { address, service, words: BufReader::new(peers::connect(address, service)?), server: 0 };
        client.server = client.answer("220 server ")?.parse()?;
        Ok(client)
    }

    /// Fetches the file that says which server it is from. To be called in the client's namespace.
    ///
    /// # Errors
    ///
    /// When the server does not answer as it should, or nothing is to be had on the port that it names.
    pub fn fetch(&mut self) -> Result<u8> {
        self.say("EPSV")?;
        let answer = self.answer("229 Entering Extended Passive Mode (|||")?;
        let port = answer.strip_suffix("|)").context("no port")?.parse()?;
        ensure!(port >= 1024, "a port of the system: {port}");
        let mut data = peers::connect(self.address, SocketAddr::new(self.service.ip(), port))
            .with_context(|| format!("port {port}, of server {}", self.server))?;
        self.say("RETR number")?;
        self.answer("150")?;
        let mut file = Vec::new();
        data.read_to_end(&mut file).context("read the file")?;
        self.answer("226")?;
        let &[number] = file.as_slice() else { anyhow::bail!("the file is {file:?}") };
        Ok(number)
    }

    fn say(&mut self, word: &str) -> Result<()> {
        Ok(write!(self.words.get_mut(), "{word}\r\n")?)
    }

    /// What follows `begin` in the server's next line, which has to begin so.
    fn answer(&mut self, begin: &str) -> Result<String> {
        let mut line = String::new();
        self.words.read_line(&mut line).context("wait for an answer")?;
        let rest = line.trim_end().strip_prefix(begin);
        Ok(rest.with_context(|| format!("the server says {line:?}"))?.to_owned())
    }
}
