package loop

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// This file pins what crypto/tls really does, as far as a loop relies on it or must
// mind it. When a release of Go changes one of these, the loop must be looked at
// before it is built with that release.

// memory is a net.Conn of memory, as a Wire is on a loop.
type memory struct {
	net.Conn // for the handshake
	joined   bool

	in        []byte
	end       error // after in; nil: errAgain
	out       [][]byte
	writeErr  error
	deadlines []time.Time
	closed    bool
}

func (m *memory) Read(p []byte) (int, error) {
	switch {
	case !m.joined:
		return m.Conn.Read(p)
	case len(m.in) > 0:
		n := copy(p, m.in)
		m.in = m.in[n:]
		return n, nil
	case m.end != nil:
		return 0, m.end
	}
	return 0, errAgain
}

func (m *memory) Write(p []byte) (int, error) {
	if !m.joined {
		return m.Conn.Write(p)
	}
	if m.writeErr != nil {
		return 0, m.writeErr
	}
	m.out = append(m.out, bytes.Clone(p))
	return len(p), nil
}

func (m *memory) SetWriteDeadline(t time.Time) error {
	m.deadlines = append(m.deadlines, t)
	return nil
}

func (m *memory) Close() error { m.closed = true; return nil }

// take returns what was written, in order.
func (m *memory) take() []byte {
	all := bytes.Join(m.out, nil)
	m.out = nil
	return all
}

// ends are the two ends of a connection whose handshake is made.
type ends struct {
	client, server       *tls.Conn
	clientMem, serverMem *memory
	secrets              map[string][]byte // of the client's key log
}

func memoryEnds(t *testing.T, version uint16, edit func(client, server *tls.Config)) *ends {
	t.Helper()
	a, b := tcpPair(t)
	e := &ends{clientMem: &memory{Conn: a}, serverMem: &memory{Conn: b}}
	var log bytes.Buffer
	clientCfg, serverCfg := clientConfig(version), serverConfig(version)
	clientCfg.KeyLogWriter = &log
	if edit != nil {
		edit(clientCfg, serverCfg)
	}
	e.client, e.server = tls.Client(e.clientMem, clientCfg), tls.Server(e.serverMem, serverCfg)
	var shaking sync.WaitGroup
	shaking.Go(func() {
		if err := e.server.Handshake(); err != nil {
			t.Error(err)
		}
		b.Close()
	})
	if err := e.client.Handshake(); err != nil {
		t.Fatal(err)
	}
	shaking.Wait()
	e.clientMem.in, _ = io.ReadAll(a) // tickets, as far as they were not read before
	e.clientMem.joined, e.serverMem.joined = true, true
	e.secrets = map[string][]byte{}
	for line := range strings.Lines(log.String()) {
		fields := strings.Fields(line)
		e.secrets[fields[0]], _ = hex.DecodeString(fields[2])
	}
	return e
}

// TestTLSReadGoesOn: Read can be called again after a temporary error at each byte
// of a record, on both ends.
func TestTLSReadGoesOn(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		e := memoryEnds(t, version, nil)
		try := func(from, to *tls.Conn, out, in *memory) {
			message := bytes.Repeat([]byte("byte"), 20)
			got := make([]byte, 1000)
			for split, size := 0, 1000; split <= size; split++ {
				if _, err := from.Write(message); err != nil {
					t.Fatal(err)
				}
				record := out.take()
				size = len(record)
				in.in = record[:split]
				n, err := to.Read(got)
				if split < len(record) {
					if n != 0 || err != errAgain {
						t.Fatalf("with %d of %d bytes: %d, %v", split, len(record), n, err)
					}
					in.in = record[split:]
					n, err = to.Read(got)
				}
				if err != nil || !bytes.Equal(got[:n], message) {
					t.Fatalf("split at %d: %q, %v", split, got[:n], err)
				}
				if n, err = to.Read(got); n != 0 || err != errAgain {
					t.Fatalf("after the record: %d, %v", n, err)
				}
			}
		}
		for range 3 {
			try(e.client, e.server, e.clientMem, e.serverMem)
			// For TLS 1.3 the tickets are still before it.
			if n, err := e.client.Read(make([]byte, 1)); n != 0 || err != errAgain {
				t.Fatalf("tickets: %d, %v", n, err)
			}
			try(e.server, e.client, e.serverMem, e.clientMem)
		}
	})
}

// TestTLSHandshakeDoesNot: a handshake can't go on after a temporary error, so it
// is made before a connection joins a loop, and renegotiation is not possible there.
func TestTLSHandshakeDoesNot(t *testing.T) {
	m := &memory{joined: true}
	client := tls.Client(m, clientConfig(tls.VersionTLS13))
	first := client.Handshake()
	m.in = []byte{22}
	if second := client.Handshake(); first != errAgain || second != first || len(m.in) != 1 {
		t.Errorf("the errors are %v and %v, %d bytes were not read", first, second, len(m.in))
	}
}

// TestTLSTickets: the tickets of TLS 1.3 arrive on Read, which returns nothing.
func TestTLSTickets(t *testing.T) {
	cache := tls.NewLRUClientSessionCache(1)
	e := memoryEnds(t, tls.VersionTLS13, func(client, _ *tls.Config) { client.ClientSessionCache = cache })
	if _, ok := cache.Get("loop.test"); ok {
		t.Error("the session came with the handshake")
	}
	if n, err := e.client.Read(make([]byte, 1)); n != 0 || err != errAgain {
		t.Errorf("Read: %d, %v", n, err)
	}
	if _, ok := cache.Get("loop.test"); !ok {
		t.Error("the session did not come with Read")
	}
}

// TestTLSEnds: close_notify is io.EOF without a further Read below; FIN is io.EOF
// between records and io.ErrUnexpectedEOF within one.
func TestTLSEnds(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		for _, end := range []string{"close_notify", "between", "within"} {
			e := memoryEnds(t, version, nil)
			want := io.EOF
			switch end {
			case "close_notify":
				e.client.CloseWrite()
				e.serverMem.in = e.clientMem.take()
			case "between":
				e.serverMem.end = io.EOF
			case "within":
				e.client.Write([]byte("cut"))
				record := e.clientMem.take()
				e.serverMem.in, e.serverMem.end = record[:len(record)-1], io.EOF
				want = io.ErrUnexpectedEOF
			}
			for range 2 {
				if n, err := e.server.Read(make([]byte, 10)); n != 0 || err != want {
					t.Errorf("%s: %d, %v", end, n, err)
				}
			}
			if _, err := e.server.Write([]byte("x")); err != nil {
				t.Errorf("%s: it can't be written to any more: %v", end, err)
			}
		}
	})
}

// TestTLSDataWithError: with TLS 1.2 Read looks for close_notify after data, and
// returns data and the temporary error together when the record is cut.
func TestTLSDataWithError(t *testing.T) {
	e := memoryEnds(t, tls.VersionTLS12, nil)
	e.client.Write([]byte("last"))
	e.client.CloseWrite()
	records := e.clientMem.take()
	e.serverMem.in = records[:len(records)-5]
	got := make([]byte, 10)
	if n, err := e.server.Read(got); n != 4 || err != errAgain {
		t.Errorf("Read: %d, %v", n, err)
	}
	e.serverMem.in = records[len(records)-5:]
	if n, err := e.server.Read(got); n != 0 || err != io.EOF {
		t.Errorf("Read: %d, %v", n, err)
	}
}

// TestTLSWriteErrorsStick: after one error of a write nothing can be written, even
// if the error was temporary.
func TestTLSWriteErrorsStick(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		e := memoryEnds(t, version, nil)
		e.serverMem.writeErr = errAgain
		_, first := e.server.Write([]byte("x"))
		e.serverMem.writeErr = nil
		if _, second := e.server.Write([]byte("x")); !errors.Is(first, errAgain) || second == nil {
			t.Errorf("the errors are %v and %v", first, second)
		}
	})
}

// TestTLSClose: close_notify comes with a write deadline of 5 s and then one in the
// past, and Close sends none while a Write is under way.
func TestTLSClose(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		e := memoryEnds(t, version, nil)
		e.serverMem.deadlines = nil
		before := time.Now()
		if err := e.server.CloseWrite(); err != nil || len(e.serverMem.out) != 1 {
			t.Errorf("CloseWrite: %v, %d records", err, len(e.serverMem.out))
		}
		d := e.serverMem.deadlines
		if len(d) != 2 || d[0].Before(before.Add(5*time.Second)) || d[1].After(time.Now()) {
			t.Errorf("the deadlines are %v", d)
		}
		if _, err := e.server.Write([]byte("x")); err == nil {
			t.Error("it can be written to after close_notify")
		}
		if err := e.server.CloseWrite(); err != nil || len(e.serverMem.out) != 1 {
			t.Errorf("another CloseWrite: %v, %d records", err, len(e.serverMem.out))
		}

		a, b := net.Pipe()
		ts := make(chan *tls.Conn, 1)
		go func() {
			s := tls.Server(b, serverConfig(version))
			s.SetDeadline(time.Now().Add(patience))
			_, _ = s.Read(make([]byte, 1))
			ts <- s
		}()
		tc := tls.Client(a, clientConfig(version))
		if _, err := tc.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		server := receive(t, ts, "the handshake")
		writing := make(chan error, 1)
		go func() { _, err := server.Write(make([]byte, 1000)); writing <- err }()
		got := make([]byte, 5)
		if _, err := io.ReadFull(a, got); err != nil { // the Write is under way
			t.Fatal(err)
		}
		server.Close()
		<-writing
		if rest, _ := io.ReadAll(a); len(rest) != 0 {
			t.Errorf("Close sent %d bytes during a Write", len(rest))
		}
		a.Close()
	})
}

// TestTLSRecords: with dynamic record sizing off a Write is one record, up to 16
// KiB; with it on, the first are small. Each record is a Write below.
func TestTLSRecords(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		for _, off := range []bool{true, false} {
			e := memoryEnds(t, version, func(_, server *tls.Config) { server.DynamicRecordSizingDisabled = off })
			e.server.Write(make([]byte, 2*maxPlaintext))
			if n := len(e.serverMem.out); (n == 2) != off {
				t.Errorf("dynamic record sizing off %t: %d records", off, n)
			}
		}
	})
}

// rawInput is how much memory a tls.Conn keeps for what it reads.
func rawInput(c *tls.Conn) int {
	return reflect.ValueOf(c).Elem().FieldByName("rawInput").FieldByName("buf").Cap()
}

// TestTLSRawInput: the memory for what is read grows with the largest record and
// never shrinks. So an idle connection that once sent large records holds some 18
// KB, whatever the loop does.
func TestTLSRawInput(t *testing.T) {
	versions(t, func(t *testing.T, version uint16) {
		e := memoryEnds(t, version, nil)
		exchange := func(n int) {
			e.client.Write(make([]byte, n))
			e.serverMem.in = e.clientMem.take()
			for got := 0; got < n; {
				m, err := e.server.Read(make([]byte, maxPlaintext))
				if err != nil {
					t.Fatal(err)
				}
				got += m
			}
		}
		exchange(1000)
		small := rawInput(e.server)
		exchange(maxPlaintext)
		large := rawInput(e.server)
		for range 100 {
			exchange(10)
		}
		if small > 8<<10 || large < maxPlaintext || large > 64<<10 || rawInput(e.server) != large {
			t.Errorf("it holds %d bytes, then %d, and then %d", small, large, rawInput(e.server))
		}
		t.Logf("%d bytes after records of 1,000 bytes, %d after 16 KiB", small, large)
	})
}

// sealer makes TLS 1.3 records of any kind in the client's place.
type sealer struct {
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	seq    uint64
}

func newSealer(t *testing.T, secret []byte) *sealer {
	t.Helper()
	if len(secret) != sha256.Size {
		t.Skip("crypto/tls chose a suite other than TLS_AES_128_GCM_SHA256, for which this test has no keys")
	}
	s := &sealer{}
	s.rekey(secret)
	return s
}

func (s *sealer) rekey(secret []byte) {
	block, err := aes.NewCipher(expandLabel(secret, "key", 16))
	if err != nil {
		panic(err)
	}
	s.aead, err = cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	s.secret, s.iv, s.seq = secret, expandLabel(secret, "iv", 12), 0
}

// expandLabel is HKDF-Expand-Label (RFC 8446 section 7.1).
func expandLabel(secret []byte, label string, n int) []byte {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len("tls13 "+label)))
	info = append(info, "tls13 "+label...)
	out, err := hkdf.Expand(sha256.New, secret, string(append(info, 0)), n)
	if err != nil {
		panic(err)
	}
	return out
}

func (s *sealer) record(kind byte, content []byte) []byte {
	nonce := bytes.Clone(s.iv)
	for i := range 8 {
		nonce[4+i] ^= byte(s.seq >> (56 - 8*i))
	}
	s.seq++
	inner := append(bytes.Clone(content), kind)
	header := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(inner)+s.aead.Overhead()))
	return s.aead.Seal(header, nonce, inner, header)
}

func (s *sealer) data(p string) []byte { return s.record(23, []byte(p)) }

// keyUpdate asks for a KeyUpdate in return (RFC 8446 section 4.6.3).
func (s *sealer) keyUpdate() []byte {
	record := s.record(22, []byte{24, 0, 0, 1, 1})
	s.rekey(expandLabel(s.secret, "traffic upd", sha256.Size))
	return record
}

const clientSecret = "CLIENT_TRAFFIC_SECRET_0"

// TestTLSKeyUpdate: KeyUpdate is answered by a Write within Read; more than 16 in a
// row without data end the connection; an error of that Write shows with the next.
func TestTLSKeyUpdate(t *testing.T) {
	e := memoryEnds(t, tls.VersionTLS13, nil)
	s := newSealer(t, e.secrets[clientSecret])
	got := make([]byte, 10)
	for round := range 10 {
		for range 16 {
			e.serverMem.in = append(e.serverMem.in, s.keyUpdate()...)
		}
		e.serverMem.in = append(e.serverMem.in, s.data("data")...)
		if n, err := e.server.Read(got); n != 4 || err != nil {
			t.Fatalf("round %d: %d, %v", round, n, err)
		}
		if n := len(e.serverMem.out); n != 16 {
			t.Fatalf("%d records were written", n)
		}
		e.serverMem.out = nil
	}
	for range 17 {
		e.serverMem.in = append(e.serverMem.in, s.keyUpdate()...)
	}
	if n, err := e.server.Read(got); n != 0 || err == nil || err == errAgain {
		t.Errorf("17 in a row: %d, %v", n, err)
	}

	e = memoryEnds(t, tls.VersionTLS13, nil)
	s = newSealer(t, e.secrets[clientSecret])
	e.serverMem.writeErr = io.ErrClosedPipe
	e.serverMem.in = append(s.keyUpdate(), s.data("data")...)
	_, _ = e.server.Read(got)
	e.serverMem.writeErr = nil
	if _, err := e.server.Write([]byte("x")); err == nil {
		t.Error("the error of the Write within Read was forgotten")
	}
}

// TestKeyUpdateStorm: a peer that asks for KeyUpdates and reads none is no longer
// read from, costs bounded memory, and delays nobody.
func TestKeyUpdateStorm(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		cfg.Loops, cfg.HighWater = 1, 2<<10
		g := start(t, cfg)
		l := g.Next()
		tcp, server := tcpPair(t)
		_, _ = tcp.SetReadBuffer(4<<10), server.SetWriteBuffer(4<<10)
		wire := NewWire(server)
		var log bytes.Buffer
		clientCfg := clientConfig(tls.VersionTLS13)
		clientCfg.KeyLogWriter = &log
		tc, ts := tls.Client(tcp, clientCfg), tls.Server(wire, serverConfig(tls.VersionTLS13))
		shaken := make(chan error, 1)
		go func() { shaken <- ts.Handshake() }()
		if err := errors.Join(tc.Handshake(), <-shaken); err != nil {
			t.Fatal(err)
		}
		var secret []byte
		for line := range strings.Lines(log.String()) {
			if fields := strings.Fields(line); fields[0] == clientSecret {
				secret, _ = hex.DecodeString(fields[2])
			}
		}
		s := newSealer(t, secret)
		var conn *Conn
		got := 0
		if err := l.Join(wire, ts, &funcs{
			open: func(c *Conn) { conn = c },
			data: func(_ *Conn, p []byte) { got += len(p) },
		}); err != nil {
			t.Fatal(err)
		}
		storm := make(chan struct{})
		go func() {
			defer close(storm)
			for {
				var batch []byte
				for range 16 {
					batch = append(batch, s.keyUpdate()...)
				}
				if _, err := tcp.Write(append(batch, s.data("x")...)); err != nil {
					return
				}
			}
		}()
		eventually(t, l, "the peer not to be read from", func() bool {
			return conn != nil && conn.phase == open && !conn.mayRead() && (conn.blocked || conn.source.busy())
		})
		quick, _ := serve(t, l, tls.VersionTLS13, echo(nil))
		for range 10 {
			roundTrip(t, quick, "x")
		}
		on(t, l, func() {
			if b := conn.Buffered(); b > 2*cfg.HighWater+2*readSize || got == 0 {
				t.Errorf("%d bytes are buffered, %d came", b, got)
			}
		})
		tcp.Close()
		<-storm
	})
}
