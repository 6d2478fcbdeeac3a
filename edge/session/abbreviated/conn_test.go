package abbreviated

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/iotest"
	"time"
	"unsafe"
)

func plainSession() Config {
	return Config{Session: sessionOf(gcm128, true), Config: plainConfig()}
}

// Records that were damaged, replayed, reordered or lost end the connection, with
// nothing of them delivered.
func TestBadRecords(t *testing.T) {
	data := func(f *fake, text string) []byte { return f.seal(recordApplicationData, []byte(text)) }
	for name, test := range map[string]struct {
		serve func(*fake)
		alert tls.AlertError
	}{
		"damaged tag": {func(f *fake) {
			bad := data(f, "bad")
			bad[len(bad)-1] ^= 1
			f.send(bad)
		}, alertBadRecordMAC},
		"damaged content": {func(f *fake) {
			bad := data(f, "bad")
			bad[len(bad)-tagSize-1] ^= 1
			f.send(bad)
		}, alertBadRecordMAC},
		"damaged type": {func(f *fake) {
			bad := data(f, "\x01\x00")
			bad[0] = recordAlert
			f.send(bad)
		}, alertBadRecordMAC},
		"replayed": {func(f *fake) {
			again := data(f, "")
			f.send(again, again)
		}, alertBadRecordMAC},
		"the handshake's Finished replayed": {func(f *fake) {
			f.writing.seq = 0
			f.send(f.seal(recordHandshake, f.serverFinished))
		}, alertBadRecordMAC},
		"reordered": {func(f *fake) {
			one, two := data(f, "one"), data(f, "two")
			f.send(two, one)
		}, alertBadRecordMAC},
		"one lost": {func(f *fake) {
			_ = data(f, "one")
			f.send(data(f, "two"))
		}, alertBadRecordMAC},
		"cut": {func(f *fake) {
			bad := data(f, "bad")
			bad[4]--
			f.send(bad[:len(bad)-1])
		}, alertBadRecordMAC},
		"in clear":           {func(f *fake) { f.sealed = false; f.send(data(f, "a text that is longer than a tag")) }, alertBadRecordMAC},
		"an alert in clear":  {func(f *fake) { f.sealed = false; f.send(f.seal(recordAlert, []byte{1, 0})) }, alertBadRecordMAC},
		"sealed by the peer": {func(f *fake) { mirror := *f.reading; f.writing = &mirror; f.send(data(f, "mirrored")) }, alertBadRecordMAC},
		"too long":           {func(f *fake) { f.send(appendHeader(nil, recordApplicationData, maxPlaintext+f.writing.overhead()+1)) }, alertRecordOverflow},
		"of 64 KiB":          {func(f *fake) { f.send(appendHeader(nil, recordApplicationData, 1<<16-1)) }, alertRecordOverflow},
		"of an unknown type": {func(f *fake) { f.send(appendHeader(nil, 24, 40)) }, alertUnexpectedMessage},
		"of TLS 1.1":         {func(f *fake) { bad := data(f, "bad"); bad[2] = 2; f.send(bad) }, alertProtocolVersion},
		"empty ones without end": {func(f *fake) {
			for range maxUseless + 1 {
				f.send(data(f, ""))
			}
		}, alertUnexpectedMessage},
		"warnings without end": {func(f *fake) {
			for range maxUseless + 1 {
				f.send(f.seal(recordAlert, []byte{levelWarning, 90}))
			}
		}, alertUnexpectedMessage},
		"ChangeCipherSpec": {func(f *fake) { f.send(f.seal(recordChangeCipherSpec, []byte{1})) }, alertUnexpectedMessage},
		"Finished again":   {func(f *fake) { f.send(f.seal(recordHandshake, f.serverFinished)) }, alertUnexpectedMessage},
		"a ticket":         {func(f *fake) { f.send(f.seal(recordHandshake, handshakeMessage(messageNewSessionTicket, nil))) }, alertUnexpectedMessage},
		"a ServerHello":    {func(f *fake) { f.send(f.seal(recordHandshake, f.serverHello)) }, alertUnexpectedMessage},
		"an empty message": {func(f *fake) { f.send(f.seal(recordHandshake, nil)) }, alertUnexpectedMessage},
		"a HelloRequest with content": {func(f *fake) {
			f.send(f.seal(recordHandshake, handshakeMessage(messageHelloRequest, []byte{0})))
		}, alertUnexpectedMessage},
		"half a HelloRequest, then data": {func(f *fake) { f.send(f.seal(recordHandshake, []byte{0, 0}), data(f, "x")) }, alertUnexpectedMessage},
		"HelloRequests without end":      {func(f *fake) { f.send(f.seal(recordHandshake, make([]byte, 4*(maxUseless+1)))) }, alertUnexpectedMessage},
		"half an alert":                  {func(f *fake) { f.send(f.seal(recordAlert, []byte{1})) }, alertDecodeError},
		"an alert of no level":           {func(f *fake) { f.send(f.seal(recordAlert, []byte{0, 40})) }, alertIllegalParameter},
	} {
		for _, suite := range suitesUnderTest {
			t.Run(fmt.Sprintf("%s/%04x", name, suite), func(t *testing.T) {
				cfg := Config{Session: sessionOf(suite, true), Config: plainConfig()}
				c, wait := connected(t, cfg, func(f *fake) {
					f.send(f.seal(recordApplicationData, []byte("good")))
					test.serve(f)
					f.send(f.seal(recordApplicationData, []byte("after")))
				})
				got, err := io.ReadAll(c)
				var alert tls.AlertError
				if string(got) != "good" || !errors.As(err, &alert) || alert != test.alert {
					t.Errorf("read %q, %v; want good and alert %d", got, err, test.alert)
				}
				if n, again := c.Read(make([]byte, 10)); n != 0 || again != err {
					t.Errorf("then %d, %v", n, again)
				}
				if n, again := c.Write([]byte("x")); n != 0 || again != err {
					t.Errorf("wrote %d, %v", n, again)
				}
				f := wait()
				alerts := f.alerts()
				if len(alerts) == 0 || alerts[len(alerts)-1] != test.alert || f.records[len(f.records)-1].content[0] != levelFatal {
					t.Errorf("alerts %v", alerts)
				}
			})
		}
	}
}

// TestEnds: how a connection may end, and what Read makes of it.
func TestEnds(t *testing.T) {
	for name, test := range map[string]struct {
		serve func(*fake)
		want  error
	}{
		"close_notify":             {func(f *fake) { f.send(f.seal(recordAlert, []byte{levelWarning, 0})) }, io.EOF},
		"close_notify, said fatal": {func(f *fake) { f.send(f.seal(recordAlert, []byte{levelFatal, 0})) }, io.EOF},
		"FIN":                      {func(*fake) {}, io.EOF},
		"FIN within a header":      {func(f *fake) { f.send(f.seal(recordApplicationData, []byte("x"))[:3]) }, io.ErrUnexpectedEOF},
		"FIN within a record":      {func(f *fake) { f.send(f.seal(recordApplicationData, []byte("x"))[:20]) }, io.ErrUnexpectedEOF},
		"an alert":                 {func(f *fake) { f.send(f.seal(recordAlert, []byte{levelFatal, 40})) }, alertHandshakeFailure},
		"data after close_notify": {func(f *fake) {
			f.send(f.seal(recordAlert, []byte{levelWarning, 0}), f.seal(recordApplicationData, []byte("more")))
		}, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			c, wait := connected(t, plainSession(), func(f *fake) {
				f.send(f.seal(recordApplicationData, []byte("good")))
				test.serve(f)
			})
			defer wait()
			buffer := make([]byte, 100)
			n, err := io.ReadFull(c, buffer[:4])
			if err != nil && n != 4 {
				t.Fatal(n, err)
			}
			for range 3 {
				n, err := c.Read(buffer)
				if n != 0 || !errors.Is(err, test.want) || test.want == io.EOF && err != io.EOF {
					t.Errorf("%d, %v; want %v", n, err, test.want)
				}
			}
			if n, err := c.Write([]byte("x")); test.want == io.EOF && (n != 1 || err != nil) {
				t.Errorf("wrote %d, %v: the other direction is still open", n, err)
			}
		})
	}
}

// A close_notify that came with the last bytes is reported with them.
func TestEndComesWithTheLastBytes(t *testing.T) {
	sent := make(chan struct{})
	c, wait := connected(t, plainSession(), func(f *fake) {
		f.send(f.seal(recordApplicationData, []byte("last")), f.seal(recordAlert, []byte{levelWarning, 0}))
		close(sent)
	})
	defer wait()
	<-sent
	buffer := make([]byte, 3)
	if n, err := c.Read(buffer); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := c.Read(buffer); n != 1 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}
}

// HelloRequest is answered with a warning, and the connection goes on (RFC 5246
// section 7.2.2).
func TestHelloRequest(t *testing.T) {
	c, wait := connected(t, plainSession(), func(f *fake) {
		request := handshakeMessage(messageHelloRequest, nil)
		f.send(f.seal(recordHandshake, request))
		f.send(f.seal(recordHandshake, request[:1]), f.seal(recordHandshake, request[1:]))
		f.send(f.seal(recordHandshake, append(request, request...)), f.seal(recordApplicationData, []byte("on")))
	})
	if got, err := io.ReadAll(c); string(got) != "on" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := c.Write([]byte("and on")); err != nil {
		t.Error(err)
	}
	f := wait()
	if want := []tls.AlertError{100, 100, 100, 100}; !slices.Equal(f.alerts(), want) {
		t.Errorf("alerts %v, want %v", f.alerts(), want)
	}
	if last := f.records[len(f.records)-1]; string(last.content) != "and on" {
		t.Errorf("the last record is %v", last)
	}
}

// After a time-out reading goes on where it stopped, within a record too.
func TestReadTimeout(t *testing.T) {
	steps := make(chan struct{})
	c, wait := connected(t, plainSession(), func(f *fake) {
		whole := slices.Concat(f.seal(recordApplicationData, make([]byte, 3000)), f.seal(recordApplicationData, []byte("end")))
		for _, part := range [][]byte{whole[:2], whole[2:10], whole[10:2500], whole[2500:]} {
			<-steps
			f.send(part)
		}
	})
	defer wait()
	buffer := make([]byte, 1<<14)
	for range 3 {
		for range 2 {
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
			n, err := c.Read(buffer)
			if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("%d, %v", n, err)
			}
		}
		steps <- struct{}{}
	}
	steps <- struct{}{}
	_ = c.SetReadDeadline(time.Now().Add(limit))
	got, err := io.ReadAll(c)
	if len(got) != 3003 || err != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// After a time-out nothing more is written: the peer would find a record that
// begins within another.
func TestWriteTimeout(t *testing.T) {
	quiet := make(chan struct{})
	c, wait := connected(t, plainSession(), func(*fake) { <-quiet })
	_ = c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	_, first := c.Write(make([]byte, 64<<20))
	var netErr net.Error
	if !errors.As(first, &netErr) || !netErr.Timeout() {
		t.Fatal(first)
	}
	_ = c.SetWriteDeadline(time.Now().Add(limit))
	if n, err := c.Write([]byte("x")); n != 0 || err != first {
		t.Errorf("%d, %v", n, err)
	}
	if err := c.CloseWrite(); err != first {
		t.Errorf("CloseWrite: %v", err)
	}
	close(quiet)
	wait()
}

// A record that ends the connection is reported although a Write is stuck: the peer
// may not read before we do.
func TestFailureWhileAWriteIsStuck(t *testing.T) {
	quiet, writing := make(chan struct{}), make(chan struct{})
	c, wait := connected(t, plainSession(), func(f *fake) {
		<-writing
		f.send(f.seal(recordHandshake, handshakeMessage(messageHelloRequest, nil)), f.seal(recordChangeCipherSpec, []byte{1}))
		<-quiet
	})
	wrote := make(chan error)
	go func() {
		_, err := c.Write(make([]byte, 64<<20))
		wrote <- err
	}()
	time.Sleep(20 * time.Millisecond) // the Write fills the socket
	close(writing)
	var alert tls.AlertError
	if _, err := c.Read(make([]byte, 1)); !errors.As(err, &alert) || alert != alertUnexpectedMessage {
		t.Errorf("%v", err)
	}
	_ = c.Close()
	if err := <-wrote; err == nil {
		t.Error("the Write succeeded")
	}
	close(quiet)
	wait()
}

// Warnings that came up during a Write go out after it.
func TestWarningAfterAStuckWrite(t *testing.T) {
	drain, writing := make(chan struct{}), make(chan struct{})
	c, wait := connected(t, plainSession(), func(f *fake) {
		<-writing
		f.send(f.seal(recordHandshake, handshakeMessage(messageHelloRequest, nil)), f.seal(recordApplicationData, []byte("x")))
		<-drain
		f.rest()
	})
	const size = 16 << 20
	wrote := make(chan error)
	go func() {
		_, err := c.Write(make([]byte, size))
		wrote <- err
	}()
	time.Sleep(20 * time.Millisecond)
	close(writing)
	if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	close(drain)
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	_ = c.CloseWrite()
	f := wait()
	if want := []tls.AlertError{alertNoRenegotiation, alertCloseNotify}; !slices.Equal(f.alerts(), want) {
		t.Errorf("alerts %v, want %v", f.alerts(), want)
	}
}

// One Write is as few records as can be.
func TestRecordsOfAWrite(t *testing.T) {
	c, wait := connected(t, plainSession(), func(f *fake) { f.rest() })
	sizes := []int{0, 1, 1000, maxPlaintext, maxPlaintext + 1, 10*maxPlaintext + 5}
	var want []int
	for _, size := range sizes {
		if n, err := c.Write(make([]byte, size)); n != size || err != nil {
			t.Fatal(n, err)
		}
		for ; size > 0; size -= maxPlaintext {
			want = append(want, min(size, maxPlaintext))
		}
	}
	_ = c.CloseWrite()
	f := wait()
	var got []int
	for _, r := range f.records {
		if r.kind == recordApplicationData {
			got = append(got, len(r.content))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("records of %v, want %v", got, want)
	}
}

// writes counts the writes on a socket.
type writes struct {
	net.Conn
	n int
}

func (w *writes) Write(p []byte) (int, error) {
	w.n++
	return w.Conn.Write(p)
}

// A record is one write on the socket, and up to four are.
func TestWritesOnTheSocket(t *testing.T) {
	c, wait := connected(t, plainSession(), func(f *fake) { f.rest() })
	defer wait()
	counted := &writes{Conn: c.conn}
	c.conn = counted
	for size, want := range map[int]int{1: 1, maxPlaintext: 1, 4 * maxPlaintext: 1, 8 * maxPlaintext: 2} {
		counted.n = 0
		if _, err := c.Write(make([]byte, size)); err != nil || counted.n != want {
			t.Errorf("%d bytes: %d writes, %v", size, counted.n, err)
		}
	}
}

// still is a connection in memory: what is written vanishes, what is read has
// been put there.
type still struct {
	listener
	bytes.Reader
}

func (s *still) Write(p []byte) (int, error) { return len(p), nil }
func (s *still) Read(p []byte) (int, error)  { return s.Reader.Read(p) }

// Neither reading nor writing allocates.
func TestAllocations(t *testing.T) {
	for _, suite := range suitesUnderTest {
		const runs, size = 200, 5000
		cfg := Config{Session: sessionOf(suite, true), Config: plainConfig()}
		var sealed []byte
		c, wait := connected(t, cfg, func(f *fake) {
			for range runs + 1 {
				sealed = append(sealed, f.seal(recordApplicationData, make([]byte, size))...)
			}
		})
		wait()
		memory := &still{}
		memory.Reset(sealed)
		c.conn = memory
		buffer := make([]byte, size)
		if n := testing.AllocsPerRun(runs, func() {
			if _, err := io.ReadFull(c, buffer); err != nil {
				t.Error(err)
			}
			if _, err := c.Write(buffer); err != nil {
				t.Error(err)
			}
		}); n > 1 { // the race detector makes pools forget
			t.Errorf("%04x: %v allocations", suite, n)
		}
	}
}

// An idle connection holds no large buffer, whatever came before.
func TestIdleMemory(t *testing.T) {
	more := make(chan int)
	c, wait := connected(t, plainSession(), func(f *fake) {
		for size := range more {
			f.send(f.seal(recordApplicationData, make([]byte, size)))
		}
	})
	for _, size := range []int{1, 500, 2000, maxPlaintext, 300} {
		more <- size
		if _, err := io.ReadFull(c, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		c.in.mu.Lock()
		if c.in.large != nil || len(c.in.buf) != smallInput {
			t.Errorf("%d bytes: a large buffer is kept", size)
		}
		c.in.mu.Unlock()
	}
	if size := unsafe.Sizeof(*c); size > 3<<10 {
		t.Errorf("a connection has %d bytes", size)
	}
	close(more)
	wait()
}

// Sequence numbers are used once (RFC 5246 section 6.1).
func TestSequenceNumbersEnd(t *testing.T) {
	c, wait := connected(t, plainSession(), func(f *fake) {
		f.writing.seq, f.reading.seq = math.MaxUint64, math.MaxUint64
		f.send(f.seal(recordApplicationData, []byte("last")))
		f.writing.spent = false // a peer that does not heed it
		f.send(f.seal(recordApplicationData, []byte("more")))
		f.rest()
	})
	c.in.protection.seq, c.out.protection.seq = math.MaxUint64, math.MaxUint64
	if n, err := c.Write([]byte("x")); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := c.Write([]byte("y")); n != 0 || !errors.Is(err, errExhausted) {
		t.Errorf("%d, %v", n, err)
	}
	got, err := io.ReadAll(c)
	if string(got) != "last" || !errors.Is(err, errExhausted) {
		t.Errorf("%q, %v", got, err)
	}
	wait()
}

// CloseWrite says goodbye once and leaves the other direction open.
func TestCloseWrite(t *testing.T) {
	early := Client(nil, plainSession())
	if err := early.CloseWrite(); err == nil {
		t.Error("no error before the handshake")
	}
	said := make(chan struct{})
	c, wait := connected(t, plainSession(), func(f *fake) {
		<-said
		f.send(f.seal(recordApplicationData, []byte("answer")), f.seal(recordAlert, []byte{levelWarning, 0}))
	})
	for range 2 {
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	close(said)
	if n, err := c.Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write after Close: %v", err)
	}
	f := wait()
	if want := []tls.AlertError{alertCloseNotify}; !slices.Equal(f.alerts(), want) {
		t.Errorf("alerts %v", f.alerts())
	}
}

// Close sends close_notify, and interrupts Read and Write.
func TestClose(t *testing.T) {
	c, wait := connected(t, plainSession(), func(f *fake) { f.rest() })
	read := make(chan error)
	go func() {
		_, err := c.Read(make([]byte, 1))
		read <- err
	}()
	time.Sleep(5 * time.Millisecond)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read: %v", err)
	}
	if f := wait(); !slices.Equal(f.alerts(), []tls.AlertError{alertCloseNotify}) {
		t.Errorf("alerts %v", f.alerts())
	}
	before := Client(&listener{}, plainSession())
	if err := before.Close(); err != nil {
		t.Error(err)
	}
	if err := before.Handshake(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("handshake after Close: %v", err)
	}
}

// Much data in both directions at once, by many goroutines.
func TestConcurrent(t *testing.T) {
	for _, suite := range suitesUnderTest {
		t.Run(fmt.Sprintf("%04x", suite), func(t *testing.T) {
			const size = 2 << 20
			sent := make([]byte, size)
			_, _ = rand.Read(sent)
			cfg := Config{Session: sessionOf(suite, true), Config: plainConfig()}
			c, wait := connected(t, cfg, func(f *fake) {
				var group sync.WaitGroup
				group.Go(func() {
					for rest := sent; len(rest) > 0; {
						n := min(len(rest), 1+len(rest)%maxPlaintext)
						f.send(f.seal(recordApplicationData, rest[:n]))
						rest = rest[n:]
					}
					f.send(f.seal(recordAlert, []byte{levelWarning, 0}))
				})
				f.rest()
				group.Wait()
			})
			var writers sync.WaitGroup
			for i := range 8 {
				writers.Go(func() {
					for range 50 {
						if _, err := c.Write(bytes.Repeat([]byte{byte(i)}, 700*(i+1))); err != nil {
							t.Error(err)
						}
						_ = c.ConnectionState()
					}
				})
			}
			got, err := io.ReadAll(iotest.HalfReader(c))
			if !bytes.Equal(got, sent) || err != nil {
				t.Errorf("%d bytes of %d, %v", len(got), size, err)
			}
			writers.Wait()
			_ = c.CloseWrite()
			f := wait()
			total := 0
			for _, r := range f.records {
				if r.kind == recordApplicationData {
					total += len(r.content)
				}
			}
			if want := 50 * 700 * 36; total != want {
				t.Errorf("%d bytes arrived, want %d", total, want)
			}
		})
	}
}

// Read(nil) makes the handshake and nothing else.
func TestReadNothing(t *testing.T) {
	c, wait := against(t, plainSession(), func(f *fake) {
		f.send(f.flight(nil))
		_ = f.complete()
	})
	defer wait()
	if n, err := c.Read(nil); n != 0 || err != nil || !c.ConnectionState().HandshakeComplete {
		t.Errorf("%d, %v", n, err)
	}
}
