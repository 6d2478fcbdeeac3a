package loop

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serverEnv makes this test binary a server in a process of its own, so that its
// memory and CPU are its alone. The value says what it is built of: "epoll" and
// "goroutines" are loops, "net.Conn" is a goroutine for each connection.
const serverEnv = "RESEAL_LOOP_SERVER"

// downloadSize is what a server sends to who asks for it by a first byte of 'd'; all
// else it echoes.
const downloadSize = 100 << 20

// TestServer is the process that startServer starts.
func TestServer(t *testing.T) {
	kind := os.Getenv(serverEnv)
	if kind == "" {
		t.Skip("it is another process of other tests")
	}
	join := func(tc *tls.Conn, _ *Wire) { go plainServer(tc) }
	if kind != "net.Conn" {
		g := start(t, Config{Goroutines: kind == "goroutines"})
		join = func(tc *tls.Conn, wire *Wire) { _ = g.Next().Join(wire, tc, &loopServer{}) }
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("at", listener.Addr())
	go func() {
		defer listener.Close()
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			var usage unix.Rusage
			_ = unix.Getrusage(unix.RUSAGE_SELF, &usage)
			fmt.Println("cpu", usage.Utime.Nano()+usage.Stime.Nano())
		}
	}()
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			wire := NewWire(conn)
			var under net.Conn = wire
			if kind == "net.Conn" {
				under = conn
			}
			tc := tls.Server(under, serverConfig(tls.VersionTLS13))
			if err := tc.Handshake(); err == nil {
				join(tc, wire)
			}
		}()
	}
}

var downloadPiece = make([]byte, 64<<10)

// loopServer is the server on a loop.
type loopServer struct{ left int }

func (s *loopServer) Open(*Conn) {}

func (s *loopServer) Data(c *Conn, p []byte) {
	if p[0] == 'd' {
		s.left = downloadSize
		s.Writable(c)
		return
	}
	c.Write(p)
}

func (s *loopServer) Writable(c *Conn) {
	for s.left > 0 {
		n := min(s.left, len(downloadPiece))
		s.left -= n
		if !c.Write(downloadPiece[:n]) {
			return
		}
	}
}

func (s *loopServer) PeerEnded(c *Conn, _ bool) { c.Close(Farewell{}) }

func (s *loopServer) Closed(*Conn, Ending) {}

// plainServer is the server on a goroutine.
func plainServer(tc *tls.Conn) {
	defer tc.Close()
	buffer := make([]byte, maxPlaintext)
	for {
		n, err := tc.Read(buffer)
		if err != nil {
			return
		}
		if buffer[0] != 'd' {
			_, _ = tc.Write(buffer[:n])
			continue
		}
		for left := downloadSize; left > 0; left -= len(downloadPiece) {
			if _, err := tc.Write(downloadPiece[:min(left, len(downloadPiece))]); err != nil {
				return
			}
		}
	}
}

// server is such a process.
type server struct {
	pid     int
	address string
	in      io.Writer
	out     *bufio.Reader
}

func startServer(t testing.TB, kind string) *server {
	t.Helper()
	command := exec.Command(os.Args[0], "-test.run", "^TestServer$")
	command.Env = append(os.Environ(), serverEnv+"="+kind)
	in, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		_ = command.Wait()
	})
	s := &server{pid: command.Process.Pid, in: in, out: bufio.NewReader(out)}
	s.address = s.answer(t, "at ")
	return s
}

// answer reads a line that the server says.
func (s *server) answer(t testing.TB, prefix string) string {
	t.Helper()
	line, err := s.out.ReadString('\n')
	value, ok := strings.CutPrefix(strings.TrimSpace(line), prefix)
	if err != nil || !ok {
		t.Fatalf("the server says %q, %v", line, err)
	}
	return value
}

// cpu is what the server has used.
func (s *server) cpu(t testing.TB) time.Duration {
	t.Helper()
	fmt.Fprintln(s.in, "cpu")
	ns, err := strconv.ParseInt(s.answer(t, "cpu "), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(ns)
}

func (s *server) dial(t testing.TB) *tls.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", s.address, clientConfig(tls.VersionTLS13))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// compare reports what work costs each kind of server, medians of interleaved rounds,
// and the ratios to a goroutine for each connection.
func compare(b *testing.B, rounds int, unit string, per float64, connections int, work func(clients []*tls.Conn)) {
	kinds := []string{"net.Conn", "goroutines", "epoll"}
	servers, clients := map[string]*server{}, map[string][]*tls.Conn{}
	for _, kind := range kinds {
		servers[kind] = startServer(b, kind)
		for range connections {
			clients[kind] = append(clients[kind], servers[kind].dial(b))
		}
		work(clients[kind])
	}
	costs := map[string][]float64{}
	for range rounds {
		for _, kind := range kinds {
			before := servers[kind].cpu(b)
			work(clients[kind])
			costs[kind] = append(costs[kind], float64(servers[kind].cpu(b)-before)/per)
		}
	}
	for _, kind := range kinds {
		slices.Sort(costs[kind])
		b.ReportMetric(costs[kind][rounds/2], kind+"-"+unit)
		b.ReportMetric(costs[kind][rounds/2]/costs["net.Conn"][rounds/2], kind+"-ratio")
		for _, c := range clients[kind] {
			c.NetConn().Close()
		}
	}
}

// BenchmarkEcho is the CPU of a server for an echo of 1 KB on 32 connections of TLS
// 1.3. Run it with -benchtime 1x.
func BenchmarkEcho(b *testing.B) {
	const connections, messages = 32, 400
	compare(b, 7, "µs/message", float64(connections*messages*time.Microsecond), connections, func(clients []*tls.Conn) {
		var all sync.WaitGroup
		for _, c := range clients {
			all.Go(func() {
				message := make([]byte, 1<<10)
				for range messages {
					if _, err := c.Write(message); err != nil {
						b.Error(err)
						return
					}
					if _, err := io.ReadFull(c, message); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
	})
}

// BenchmarkDownload is the CPU of a server for a download of 100 MB. Run it with
// -benchtime 1x.
func BenchmarkDownload(b *testing.B) {
	compare(b, 5, "s/GB", downloadSize, 1, func(clients []*tls.Conn) {
		if _, err := clients[0].Write([]byte("d")); err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, clients[0], downloadSize); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkIdle is the memory of 5,000 idle connections. Run it with -benchtime 1x.
func BenchmarkIdle(b *testing.B) {
	b.ReportMetric(float64(measureIdle(b, 5000)), "PSS-B/connection")
}
