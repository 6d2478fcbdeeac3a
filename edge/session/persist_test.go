package session

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// files is a state directory in memory.
type files struct {
	mu     sync.Mutex
	data   map[string][]byte
	writes int
	err    error
}

func (f *files) Read(name string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if data, ok := f.data[name]; ok {
		return bytes.Clone(data), nil
	}
	return nil, fs.ErrNotExist
}

func (f *files) Write(name string, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	if f.data == nil {
		f.data = map[string][]byte{}
	}
	f.writes++
	f.data[name] = bytes.Clone(data)
	return nil
}

func (f *files) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.data, name)
	return f.err
}

func (f *files) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *files) written() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.writes
}

// restart moves the sessions into a new store.
func restart(t testing.TB, store *Store, clean bool) *Store {
	t.Helper()
	next := New(Config{})
	if _, err := next.Import(store.Export(time.Now(), clean), time.Now()); err != nil {
		t.Fatal(err)
	}
	return next
}

func TestSessionsSurviveRestart(t *testing.T) {
	for name, test := range map[string]struct {
		version uint16
		clean   bool
	}{
		"TLS 1.2 tickets, stopped": {tls.VersionTLS12, true},
		"TLS 1.2 tickets, crashed": {tls.VersionTLS12, false},
		"TLS 1.3, stopped":         {tls.VersionTLS13, true},
		"TLS 1.3, crashed":         {tls.VersionTLS13, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, Config{})
			p.server.MaxVersion = test.version
			p.want("a|1", 0, noSession)
			p.want("a|2", 0, noSession)
			want := ticket
			if test.version == tls.VersionTLS13 {
				want = psk
			}
			for range 2 {
				p.store = restart(t, p.store, test.clean)
				p.want("a|1", want, 0)
				p.want("a|2", want, 0)
			}
			p.want("a|3", 0, noSession)
		})
	}
}

// A crash ends connections without close_notify, for which a server may forget
// the session.
func TestDeclinedAfterCrash(t *testing.T) {
	for clean, want := range map[bool]resealv1.MissReason{true: declined, false: afterUnclean} {
		p := newPeer(t, Config{})
		p.server.MaxVersion = tls.VersionTLS12
		p.want("a", 0, noSession)
		p.store = restart(t, p.store, clean)
		p.server = p.server.Clone() // other ticket keys
		p.server.SetSessionTicketKeys([][32]byte{{1}})
		p.want("a", 0, want)
		p.want("a", ticket, 0)
	}
}

func TestSessionIDsSurviveRestart(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	_, foreign := issue(t, time.Now().Add(time.Hour))
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	store := New(Config{})
	if _, _, err := visit(t, store, address, "a", cfg); err != nil {
		t.Fatal(err)
	}
	store = restart(t, store, false)
	for range 2 {
		if mechanism, miss, err := visit(t, store, address, "a", cfg); err != nil || mechanism != sessionID {
			t.Fatalf("%v, %v, %v", mechanism, miss, err)
		}
	}
	// It is checked again when it is offered.
	store = restart(t, store, true)
	_, _, err := visit(t, store, address, "a", &tls.Config{RootCAs: foreign, ServerName: "example.test"})
	var resumption *ResumptionError
	if err == nil || errors.As(err, &resumption) {
		t.Fatalf("offered in spite of other roots: %v", err)
	}
}

// A ticket that may have been used after the last save must not be offered to a
// server that takes each once.
func TestSingleUseTicketsAfterCrash(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	p.store.mu.Lock()
	p.store.find("a").learn(reuseOnce, time.Now())
	p.store.mu.Unlock()

	crashed := restart(t, p.store, false)
	stopped := restart(t, p.store, true)
	for name, test := range map[string]struct {
		store   *Store
		tickets int
	}{"crash": {crashed, 0}, "stop": {stopped, 1}} {
		held := test.store.copyAll(time.Now())
		if len(held) != 1 || held[0].reuse != reuseOnce || len(held[0].sessions) != test.tickets {
			t.Errorf("after a %s: %+v", name, held)
		}
	}
	// The one that was used is not offered again either way.
	p.store.mu.Lock()
	p.store.find("a").sessions[0].taken++
	p.store.mu.Unlock()
	if held := restart(t, p.store, true).copyAll(time.Now()); len(held) != 1 || len(held[0].sessions) != 0 {
		t.Errorf("a used ticket: %+v", held)
	}
}

func TestImportRefuses(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	good := p.store.Export(time.Now(), true)
	release := bytes.Replace(good, []byte(runtime.Version()), bytes.Repeat([]byte("x"), len(runtime.Version())), 1)
	format := bytes.Clone(good)
	format[len(containerMagic)]++
	for name, test := range map[string]struct {
		data []byte
		want error
	}{
		"release": {release, errRelease},
		"format":  {format, errRelease},
		"nothing": {nil, errContainer},
		"cut":     {good[:len(good)-1], errContainer},
		"more":    {append(bytes.Clone(good), 1), errContainer},
		"size":    {append(bytes.Clone(good), make([]byte, maxContainer)...), errContainer},
	} {
		if n, err := New(Config{}).Import(test.data, time.Now()); n != 0 || !errors.Is(err, test.want) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	for name, when := range map[string]time.Duration{"expired": maxLifetime13 + time.Hour, "clock set back": -time.Hour} {
		if n, err := New(Config{}).Import(good, time.Now().Add(when)); n != 0 || err != nil {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	store := New(Config{})
	for i, want := range []int{1, 0} {
		if n, err := store.Import(good, time.Now()); n != want || err != nil {
			t.Errorf("import %d: %d, %v", i, n, err)
		}
	}
}

func TestRetain(t *testing.T) {
	p := newPeer(t, Config{})
	for _, identity := range []exchange.Identity{"a|1", "a|2", "b|1"} {
		p.want(identity, 0, noSession)
	}
	p.store.Retain("b", "c")
	if n := len(p.store.copyAll(time.Now())); n != 1 {
		t.Errorf("%d identities left", n)
	}
	p.want("b|1", psk, 0)
	p.want("a|1", 0, noSession)
}

// What does not fit is what was used longest ago, and the export stays bounded.
func TestExportIsBounded(t *testing.T) {
	p := newPeer(t, Config{MaxIdentities: 20_000})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a|0", 0, noSession)
	p.store.mu.Lock()
	first := p.store.find("a|0").sessions[0]
	for i := range 14_999 {
		_, r := p.store.use(exchange.Identity(fmt.Sprintf("a|%d", i+1)))
		h := first.copy()
		h.size = 0
		r.sessions = append(r.sessions, h)
	}
	p.store.mu.Unlock()
	data := p.store.Export(time.Now(), true)
	entries, _, err := parseContainer(data, maxContainer)
	if err != nil || len(data) > maxContainer || len(entries) == 0 || len(entries) == 15_000 {
		t.Fatalf("%d bytes, %d sessions, %v", len(data), len(entries), err)
	}
	if entries[0].identity != "a|14999" {
		t.Errorf("first %s", entries[0].identity)
	}
}

func TestKeeper(t *testing.T) {
	state := &files{}
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	synctest.Test(t, func(t *testing.T) {
		p.store.mu.Lock()
		for _, h := range p.store.find("a").sessions { // the bubble's clock starts in 2000
			h.born, h.useBy = time.Now(), time.Now().Add(time.Hour)
		}
		p.store.mu.Unlock()
		ctx, cancel := context.WithCancel(t.Context())
		keeper := NewKeeper(KeeperConfig{Store: p.store, State: state})
		done := make(chan error)
		go func() { done <- keeper.Run(ctx) }()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := state.written(); n != 1 {
			t.Fatalf("%d writes after the start", n)
		}
		for range 100 {
			p.store.mu.Lock()
			p.store.changed("a")
			p.store.mu.Unlock()
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := state.written(); n < 2 || n > 3 {
			t.Errorf("%d writes for 1 s of changes", n-1)
		}
		if data, _ := state.Read(sessionsFile); data[flagsAt] != 0 {
			t.Error("clean while running")
		}
		state.set(errors.New("disk full"))
		p.store.Forget("a")
		time.Sleep(5 * time.Second)
		state.set(nil)
		before := state.written()
		time.Sleep(saveAgain)
		synctest.Wait()
		if state.written() != before+1 {
			t.Error("not tried again")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if data, _ := state.Read(sessionsFile); data[flagsAt] != flagClean || bytes.Contains(data, []byte("example.test")) {
			t.Error("the last save is not clean, or holds what was forgotten")
		}
	})
}

func TestKeeperLoad(t *testing.T) {
	p := newPeer(t, Config{})
	p.want("a", 0, noSession)
	clean := p.store.Export(time.Now(), true)
	load := func(state *files) (*Store, int, error) {
		store := New(Config{})
		n, err := NewKeeper(KeeperConfig{Store: store, State: state}).Load()
		return store, n, err
	}
	if _, n, err := load(&files{}); n != 0 || err != nil {
		t.Errorf("nothing kept: %d, %v", n, err)
	}
	state := &files{data: map[string][]byte{sessionsFile: clean}}
	store, n, err := load(state)
	if n != 1 || err != nil || store.find("a").sessions[0].taken != 0 {
		t.Errorf("%d, %v", n, err)
	}
	// The same file once more, as after a crash before the first save.
	if store, n, err = load(state); n != 1 || err != nil || store.find("a").sessions[0].taken != 1 {
		t.Errorf("the second load: %d, %v", n, err)
	}
	// A file that can't be marked counts as that of a crash.
	state = &files{data: map[string][]byte{sessionsFile: clean}, err: errors.New("read only")}
	if store, n, err = load(state); n != 1 || err != nil || store.find("a").sessions[0].taken != 1 {
		t.Errorf("read only: %d, %v", n, err)
	}
	state = &files{data: map[string][]byte{sessionsFile: []byte("nonsense")}}
	if _, n, err = load(state); n != 0 || !errors.Is(err, errContainer) {
		t.Errorf("nonsense: %d, %v", n, err)
	}
	keeper := NewKeeper(KeeperConfig{Store: New(Config{}), State: state})
	if err := keeper.Erase(); err != nil || len(slices.Collect(maps.Keys(state.data))) != 0 {
		t.Errorf("not erased: %v", err)
	}
}

func TestContainerRoundTrip(t *testing.T) {
	times := rapid.Custom(func(t *rapid.T) time.Time {
		if seconds := rapid.Int64Range(0, maxUnix).Draw(t, "seconds"); seconds > 0 {
			return time.Unix(seconds, 0)
		}
		return time.Time{}
	})
	rapid.Check(t, func(t *rapid.T) {
		c := newContainer(maxContainer, rapid.Bool().Draw(t, "clean"))
		var in []entry
		for range rapid.IntRange(0, 5).Draw(t, "entries") {
			e := entry{
				identity: exchange.Identity(rapid.StringN(1, 40, maxIdentity).Draw(t, "identity")),
				used:     rapid.Bool().Draw(t, "used"), renewed: rapid.Bool().Draw(t, "renewed"),
				born: times.Draw(t, "born"), useBy: times.Draw(t, "useBy"),
				knowledge: knowledge{
					reuse:   reuseKind(rapid.IntRange(0, reuses-1).Draw(t, "reuse")),
					way:     idWay(rapid.IntRange(0, ways-1).Draw(t, "way")),
					learned: times.Draw(t, "learned"),
					turn:    time.Duration(rapid.IntRange(0, int(maxTurn/time.Microsecond)).Draw(t, "turn")) * time.Microsecond,
				},
				path:    rapid.SliceOfN(rapid.StringMatching(`[a-z]{1,63}`), 0, maxPath).Draw(t, "path"),
				ticket:  rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "ticket"),
				session: rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "session"),
			}
			switch rapid.IntRange(0, 2).Draw(t, "kind") {
			case 0:
				e.id, e.ticket = bytes.Repeat([]byte{7}, rapid.IntRange(1, maxSessionID).Draw(t, "ID")), nil
			case 1:
				e.ticket, e.session = nil, nil // what was learned, alone
			}
			if !c.add(e) {
				t.Fatal("no room")
			}
			in = append(in, e)
		}
		out, _, err := parseContainer(c.data, maxContainer)
		if err != nil || len(out) != len(in) {
			t.Fatalf("%d of %d, %v", len(out), len(in), err)
		}
		again := newContainer(maxContainer, c.data[flagsAt] == flagClean)
		for _, e := range out {
			again.add(e)
		}
		if !bytes.Equal(again.data, c.data) {
			t.Fatal("another encoding")
		}
	})
}

func FuzzParseContainer(f *testing.F) {
	p := newPeer(f, Config{})
	p.want("a", 0, noSession)
	f.Add(p.store.Export(time.Now(), true))
	p.server.MaxVersion = tls.VersionTLS12
	p.want("b", 0, noSession)
	f.Add(p.store.Export(time.Now(), false))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, clean, err := parseContainer(data, maxContainer)
		if err != nil {
			return
		}
		c := newContainer(maxContainer, clean)
		for _, e := range entries {
			c.add(e)
		}
		if !bytes.Equal(c.data, data) {
			t.Fatal("another encoding")
		}
		if _, err := New(Config{}).Import(data, time.Now()); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzParseSession(f *testing.F) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		p := newPeer(f, Config{})
		p.server.MaxVersion = version
		p.want("a", 0, noSession)
		e, err := p.store.find("a").sessions[0].entry("a", knowledge{})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(e.session)
	}
	f.Fuzz(func(t *testing.T, encoded []byte) {
		session, err := parseSession(encoded)
		if err != nil {
			return
		}
		if _, err := tls.ParseSessionState(bytes.Clone(encoded)); err != nil {
			t.Fatalf("crypto/tls refuses it: %v", err)
		}
		same, err := session.withChains(session.chains)
		if err != nil || !bytes.Equal(same.encoded, encoded) {
			t.Fatalf("another encoding, %v", err)
		}
	})
}

// Of many sessions only those that changed are written again, and after a crash
// all are there.
func TestKeeperWritesWhatChanged(t *testing.T) {
	state := &files{}
	p := newPeer(t, Config{})
	p.server.MaxVersion = tls.VersionTLS12
	p.want("a|0", 0, noSession)
	p.want("a|other", 0, noSession)
	first, other := p.store.find("a|0").sessions[0], p.store.find("a|other").sessions[0]
	load := func(t *testing.T) *Store {
		t.Helper()
		store := New(Config{})
		if _, err := NewKeeper(KeeperConfig{Store: store, State: state}).Load(); err != nil {
			t.Fatal(err)
		}
		return store
	}
	synctest.Test(t, func(t *testing.T) {
		for _, h := range []*held{first, other} { // the bubble's clock starts in 2000
			h.born, h.useBy = time.Now(), time.Now().Add(10*time.Hour)
		}
		put := func(identity exchange.Identity, h *held) {
			p.store.mu.Lock()
			defer p.store.mu.Unlock()
			_, r := p.store.use(identity)
			r.sessions = []*held{h.copy()}
			p.store.changed(identity)
		}
		for i := range 500 {
			put(exchange.Identity(fmt.Sprintf("a|%d", i)), first)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- NewKeeper(KeeperConfig{Store: p.store, State: state}).Run(ctx) }()
		rest := func() { time.Sleep(10 * time.Second); synctest.Wait() }
		rest()
		base, _ := state.Read(sessionsFile)
		for i := range 3 {
			put("a|7", other)
			put(exchange.Identity(fmt.Sprintf("a|new %d", i)), other)
			rest()
		}
		p.store.mu.Lock()
		p.store.groups["a"].drop(p.store.find("a|8"))
		p.store.changed("a|8")
		p.store.mu.Unlock()
		rest()
		now, _ := state.Read(sessionsFile)
		part, _ := state.Read(changesFile)
		if !bytes.Equal(base, now) || len(part) == 0 || len(part) > len(base)/20 {
			t.Errorf("%d bytes of changes, of %d", len(part), len(base))
		}
		crashed := load(t)
		for identity, want := range map[exchange.Identity]*held{"a|1": first, "a|7": other, "a|new 0": other, "a|new 2": other, "a|8": nil} {
			r := crashed.find(identity)
			if (r != nil && len(r.sessions) == 1) != (want != nil) || want != nil && !r.sessions[0].same(want) {
				t.Errorf("%s: %+v after a crash", identity, r)
			}
		}
		// Changes of another file say nothing, and damaged ones harm nothing.
		for _, data := range [][]byte{append([]byte{part[0] ^ 1}, part[1:]...), part[:len(part)-1], part[:5]} {
			if err := state.Write(changesFile, data); err != nil {
				t.Fatal(err)
			}
			if r := load(t).find("a|7"); r == nil || !r.sessions[0].same(first) {
				t.Errorf("%+v with %d bytes of changes", r, len(data))
			}
		}
		// Many changes are a new file.
		for i := range 300 {
			put(exchange.Identity(fmt.Sprintf("a|%d", i)), other)
		}
		rest()
		if _, err := state.Read(changesFile); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("changes are left: %v", err)
		}
		if r := load(t).find("a|299"); !r.sessions[0].same(other) {
			t.Error("a change is lost")
		}
		// However many there are, what is written is bounded.
		before, began := state.written(), time.Now()
		for range 100 {
			for i := range 300 {
				put(exchange.Identity(fmt.Sprintf("a|%d", i)), first)
			}
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		bytes := (state.written() - before) * len(base)
		if rate := bytes / int(time.Since(began).Seconds()); rate > 3*saveRate/2 || bytes == 0 {
			t.Errorf("%d bytes a second", rate)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
