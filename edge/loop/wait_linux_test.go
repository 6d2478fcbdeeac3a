package loop

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCounts bounds what a message costs, in what does not depend on the machine:
// system calls, TLS records, allocations.
func TestCounts(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		g := start(t, Config{Loops: 1})
		l := g.Next()
		var conn *Conn
		h := echo(nil)
		h.open = func(c *Conn) { conn = c }
		// A message is written in three parts, as head, body and end may be.
		h.data = func(c *Conn, p []byte) {
			c.Write(p[:len(p)/3])
			c.Write(p[len(p)/3 : len(p)/2])
			c.Write(p[len(p)/2:])
		}
		client, _ := serve(t, l, version, h)
		message := make([]byte, 1<<10)
		exchange := func() {
			if _, err := client.Write(message); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(client, message); err != nil {
				t.Fatal(err)
			}
		}
		for range 10 {
			exchange()
		}
		at := func() (c counts, records int64) {
			on(t, l, func() { c, records = l.waiter.(*epoll).counts, conn.Stats().Records })
			return c, records
		}
		// On a busy machine some come later than a loop keeps its processor.
		on(t, l, func() { l.waiter.(*epoll).hold = int(patience.Milliseconds()) })
		const n = 500
		before, recordsBefore := at()
		for range n {
			exchange()
		}
		after, records := at()
		t.Logf("per message: %.2f waits, %.2f reads, %.2f writes, %.2f controls, %.2f records",
			float64(after.waits-before.waits)/n, float64(after.reads-before.reads)/n, float64(after.writes-before.writes)/n,
			float64(after.controls-before.controls)/n, float64(records-recordsBefore)/n)
		if records-recordsBefore != n || after.writes-before.writes != n || after.reads-before.reads != n || after.controls != before.controls {
			t.Error("a message is not one record, one read and one write")
		}
		if waits := after.waits - before.waits; waits > n+20 {
			t.Errorf("%d waits for %d messages that come one by one", waits, n)
		}
		if !raceEnabled {
			// AllocsPerRun leaves the process one processor.
			on(t, l, func() { l.waiter.(*epoll).hold = 0 })
			// All are crypto/tls's: one for each attempt to read a record, of which the
			// client makes one, and the server a second one that finds nothing.
			if allocations := testing.AllocsPerRun(n, exchange); allocations > 3 {
				t.Errorf("a message allocates %.0f times", allocations)
			}
		}
		on(t, l, func() {
			if conn.gather != nil || conn.out != nil || conn.stash != nil {
				t.Error("an idle connection holds a buffer")
			}
		})
	})
}

// TestHold: a loop that keeps its processor while it waits keeps the garbage collector
// from nothing, nor what else stops all goroutines.
func TestHold(t *testing.T) {
	l := start(t, Config{Loops: 1}).Next()
	on(t, l, func() { l.waiter.(*epoll).hold = 2 * int(patience.Milliseconds()) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		var stats runtime.MemStats
		for range 20 {
			runtime.GC()
			runtime.ReadMemStats(&stats)
		}
	}()
	receive(t, done, "the garbage collector")
}

// TestRest: a loop that goes to rest at once misses nothing of what comes meanwhile, on
// connections, by wake and by timers.
func TestRest(t *testing.T) {
	l := start(t, Config{Loops: 1}).Next()
	on(t, l, func() { l.waiter.(*epoll).hold = 0 })
	const n = 1000
	var all sync.WaitGroup
	for i := range 3 {
		client := servePlain(t, l, echo(nil))
		all.Go(func() {
			message := []byte("x")
			for range n {
				if _, err := client.Write(message); err != nil {
					t.Error(err)
					return
				}
				if _, err := io.ReadFull(client, message); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Duration(i) * 10 * time.Microsecond)
			}
		})
	}
	all.Go(func() {
		for range n {
			on(t, l, func() {})
		}
	})
	fired := make(chan struct{})
	on(t, l, func() {
		left := 20
		var timer *Timer
		timer = l.Timer(func() {
			if left--; left == 0 {
				close(fired)
			} else {
				timer.Set(tick)
			}
		})
		timer.Set(tick)
	})
	receive(t, fired, "timers")
	all.Wait()
	// Nothing comes: the loop rests.
	var before, after counts
	on(t, l, func() { before = l.waiter.(*epoll).counts })
	time.Sleep(50 * time.Millisecond)
	on(t, l, func() { after = l.waiter.(*epoll).counts })
	if waits := after.waits - before.waits; waits > 20 {
		t.Errorf("an idle loop has made %d waits", waits)
	}
}

// TestProcessors: each loop brings a processor with it, and takes it away again.
func TestProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	t.Run("running", func(t *testing.T) {
		g := start(t, Config{Loops: 3})
		for _, l := range g.Loops() {
			on(t, l, func() {})
		}
		if now := runtime.GOMAXPROCS(0); now != before+3 {
			t.Errorf("%d processors, and %d with three loops", before, now)
		}
		if n := len(New(Config{}).Loops()); n != before {
			t.Errorf("%d loops by default for %d processors", n, before)
		}
	})
	if after := runtime.GOMAXPROCS(0); after != before {
		t.Errorf("%d processors, and %d when the loops have ended", before, after)
	}
}

// TestBatch: connections that are ready together cost one wait.
func TestBatch(t *testing.T) {
	g := start(t, Config{Loops: 1})
	l := g.Next()
	const n = 50
	var got sync.WaitGroup
	got.Add(n)
	var clients []net.Conn
	for range n {
		clients = append(clients, servePlain(t, l, &funcs{data: func(*Conn, []byte) { got.Done() }}))
	}
	on(t, l, func() {})
	eventually(t, l, "all to be there", func() bool { return len(l.conns) == n })
	hold := make(chan struct{})
	var before, after counts
	l.Post(func() { <-hold; before = l.waiter.(*epoll).counts })
	for _, c := range clients {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	close(hold)
	got.Wait()
	on(t, l, func() { after = l.waiter.(*epoll).counts })
	if waits, reads := after.waits-before.waits, after.reads-before.reads; waits > 4 || reads != n {
		t.Errorf("%d waits and %d reads for %d connections", waits, reads, n)
	}
}

// TestLargeWrites: a large body leaves in full records and in few system calls.
func TestLargeWrites(t *testing.T) {
	g := start(t, Config{Loops: 1})
	l := g.Next()
	var conn *Conn
	const total = 16 << 20
	written := 0
	piece := make([]byte, 50_000)
	fill := func(c *Conn) {
		conn = c
		for written < total {
			n := min(len(piece), total-written)
			written += n
			if !c.Write(piece[:n]) {
				return
			}
		}
		c.CloseWrite()
	}
	client, tcp := serve(t, l, tls.VersionTLS13, &funcs{open: fill, writable: fill})
	_ = tcp.SetReadBuffer(4 << 20)
	if n, err := io.Copy(io.Discard, client); n != total || err != nil {
		t.Fatalf("%d bytes came, %v", n, err)
	}
	on(t, l, func() {
		full := int64(total/maxPlaintext) + 2
		records, writes := conn.Stats().Records, l.waiter.(*epoll).counts.writes
		t.Logf("%d records and %d writes for %d bytes", records, writes, total)
		if records > full+full/100 {
			t.Errorf("%d records for %d bytes", records, total)
		}
	})
}

// TestWholeRecords: content that comes in full records, behind a head, leaves in them,
// by a system call, or two if the kernel does not take all at once; what is no more than the frame of a chunk
// gets no record of its own.
func TestWholeRecords(t *testing.T) {
	for _, test := range []struct {
		name            string
		before, records int
	}{{"head", 300, 1 + 8}, {"chunk", 6, 9}} {
		t.Run(test.name, func(t *testing.T) {
			l := start(t, Config{Loops: 1}).Next()
			opened := make(chan *Conn, 1)
			client, tcp := serve(t, l, tls.VersionTLS13, &funcs{open: func(c *Conn) { opened <- c }})
			_ = tcp.SetReadBuffer(4 << 20)
			c := receive(t, opened, "Open")
			var records int64
			var gathered, writes int
			on(t, l, func() {
				records, writes = c.Stats().Records, l.waiter.(*epoll).counts.writes
				c.Write(make([]byte, test.before))
				for range 8 {
					c.Write(make([]byte, maxPlaintext))
					gathered = max(gathered, len(c.gather))
				}
			})
			if _, err := io.CopyN(io.Discard, client, int64(test.before+8*maxPlaintext)); err != nil {
				t.Fatal(err)
			}
			on(t, l, func() {
				records, writes = c.Stats().Records-records, l.waiter.(*epoll).counts.writes-writes
			})
			if int(records) != test.records || writes > 2 || (test.before > shortRecord) != (gathered == 0) {
				t.Errorf("%d records, %d writes, %d bytes gathered", records, writes, gathered)
			}
		})
	}
}

// TestStaleEvent: an event of a connection that has ended, which can still come while
// its descriptor is open elsewhere, as in a process that is being started, is not its
// successor's.
func TestStaleEvent(t *testing.T) {
	g := start(t, Config{Loops: 1})
	l := g.Next()
	other := -1
	ended := make(chan Ending, 1)
	h := echo(ended)
	h.open = func(c *Conn) {
		var err error
		if other, err = unix.Dup(c.source.(*socket).fd); err != nil {
			t.Error(err)
		}
		c.finish(nil, false)
	}
	old := servePlain(t, l, h)
	receive(t, ended, "Closed")
	var successor *Conn
	h = echo(nil)
	h.open = func(c *Conn) { successor = c }
	client := servePlain(t, l, h)
	roundTrip(t, client, "x")
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, client, "y")
	on(t, l, func() {
		if s := successor.source.(*socket); s.place != 0 || s.ends {
			t.Errorf("the successor, at %d, was told of another's end: %t", s.place, s.ends)
		}
		_ = unix.Close(other)
	})
}

// TestOpenSSL speaks with another implementation, and has it ask for KeyUpdates.
func TestOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	pollers(t, func(t *testing.T, cfg Config) {
		versions(t, func(t *testing.T, version uint16) {
			g := start(t, cfg)
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			command := exec.Command("openssl", "s_client", "-connect", listener.Addr().String(), "-servername", "loop.test")
			in, _ := command.StdinPipe()
			out, said := io.Pipe()
			command.Stdout, command.Stderr = said, said
			if err := command.Start(); err != nil {
				t.Fatal(err)
			}
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			wire := NewWire(conn)
			server := tls.Server(wire, serverConfig(version))
			if err := server.Handshake(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan Ending, 1)
			if err := g.Next().Join(wire, server, echo(ended)); err != nil {
				t.Fatal(err)
			}
			lines := make(chan string, 1000)
			go func() {
				defer close(lines)
				for scanner := bufio.NewScanner(out); scanner.Scan(); {
					lines <- scanner.Text()
				}
			}()
			for i := range 5 {
				if version == tls.VersionTLS13 {
					_, _ = io.WriteString(in, "K\n") // a KeyUpdate that asks for one
					for receive(t, lines, "the KeyUpdate") != "KEYUPDATE" {
					}
				}
				line := fmt.Sprintf("line %d", i)
				_, _ = io.WriteString(in, line+"\n")
				for receive(t, lines, line) != line {
				}
			}
			_, _ = io.WriteString(in, "Q\n")
			if end := receive(t, ended, "Closed"); !end.ByPeer || !end.PeerNotified && !end.FIN {
				t.Errorf("it ended with %+v", end)
			}
			_ = command.Wait()
			said.Close()
			for range lines {
			}
		})
	})
}

// measureIdle returns what each of n connections that have sent a message adds to the
// proportional set size of a server, in bytes.
func measureIdle(t testing.TB, n int) int {
	t.Helper()
	server := startServer(t, "epoll")
	pss := func() int {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", server.pid))
		if err != nil {
			t.Skipf("this kernel does not tell: %v", err)
		}
		for line := range strings.Lines(string(b)) {
			if fields := strings.Fields(line); fields[0] == "Pss:" {
				kb, _ := strconv.Atoi(fields[1])
				return kb << 10
			}
		}
		t.Fatal("there is no Pss")
		return 0
	}
	open := func() *tls.Conn {
		c := server.dial(t)
		roundTrip(t, c, strings.Repeat("x", 1<<10))
		return c
	}
	var all []*tls.Conn
	defer func() {
		for _, c := range all {
			c.NetConn().Close()
		}
	}()
	for range 50 {
		all = append(all, open())
	}
	before := pss()
	for range n {
		all = append(all, open())
	}
	return (pss() - before) / n
}

// TestIdleMemory bounds what an idle connection holds.
func TestIdleMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector's memory is not of interest")
	}
	bytes := measureIdle(t, 300)
	t.Logf("%d bytes of PSS for each idle connection", bytes)
	if bytes > 24<<10 {
		t.Errorf("an idle connection holds %d bytes", bytes)
	}
}
