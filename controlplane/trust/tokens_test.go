package trust

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// All refusals are the same, whatever the reason.
func TestRefusedTokens(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	other := openTrust(t, testConfig(t))
	anonymous, admin := s.enrollment(t), s.admin(t)
	used := createToken(t, s, "e")
	if _, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: used.GetToken(), Id: "e", CertificateRequest: newRequest(t, newKey(t))}); err != nil {
		t.Fatal(err)
	}
	revoked := createToken(t, s, "e")
	if _, err := admin.RevokeToken(t.Context(), &resealv1.RevokeTokenRequest{TokenId: revoked.GetInfo().GetTokenId()}); err != nil {
		t.Fatal(err)
	}
	expired, err := admin.CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "e", Ttl: durationpb.New(time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Millisecond)
	good := createToken(t, s, "e").GetToken()
	parts := strings.Split(good, ".")
	refused := map[string]string{
		"used":           used.GetToken(),
		"revoked":        revoked.GetToken(),
		"expired":        expired.GetToken(),
		"unknown":        newCredential().text(s.trust.CAHash()),
		"wrong secret":   parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 32)),
		"other hash":     other.CAHash() + "." + parts[1] + "." + parts[2],
		"empty":          "",
		"words":          "let.me.in",
		"no secret":      parts[0] + "." + parts[1] + ".",
		"longer":         good + "A",
		"more parts":     good + ".x",
		"id with slash":  parts[0] + ".../../../ca/x." + parts[2],
		"huge":           strings.Repeat("a", 1<<20),
		"padded base64":  good + "=",
		"leading spaces": " " + good,
	}
	for name, token := range refused {
		t.Run(name, func(t *testing.T) {
			_, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: token, Id: "e", CertificateRequest: newRequest(t, newKey(t))})
			if status.Convert(err).Message() != status.Convert(errRefused).Message() {
				t.Errorf("message %v", err)
			}
			wantCode(t, err, codes.PermissionDenied)
		})
	}
	bare := parts[1] + "." + parts[2]
	if _, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: bare, Id: "e", CertificateRequest: newRequest(t, newKey(t))}); err != nil {
		t.Errorf("the good token, without hash: %v", err)
	}
}

func TestExpiredTokensAreRemoved(t *testing.T) {
	cfg := testConfig(t)
	s := serve(t, openTrust(t, cfg), true)
	if _, err := s.admin(t).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "e", Ttl: durationpb.New(time.Millisecond)}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Millisecond)
	if list, err := s.admin(t).ListTokens(t.Context(), &resealv1.ListTokensRequest{}); err != nil || len(list.GetTokens()) != 0 {
		t.Errorf("listed: %v, %v", list, err)
	}
	eventually(t, "removed from the store", func() bool {
		answer, err := cfg.Client.Get(t.Context(), cfg.Prefix+tokensPrefix, clientv3.WithPrefix())
		return err == nil && len(answer.Kvs) == 0
	})
}

func TestCreateTokenChecks(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many[fmt.Sprint(i)] = ""
	}
	for name, c := range map[string]struct {
		req   *resealv1.CreateTokenRequest
		field string
	}{
		"no id":         {&resealv1.CreateTokenRequest{}, "id"},
		"slash":         {&resealv1.CreateTokenRequest{Id: "a/b"}, "id"},
		"dots":          {&resealv1.CreateTokenRequest{Id: ".."}, "id"},
		"long":          {&resealv1.CreateTokenRequest{Id: strings.Repeat("a", 64)}, "id"},
		"not ASCII":     {&resealv1.CreateTokenRequest{Id: "ä"}, "id"},
		"zero ttl":      {&resealv1.CreateTokenRequest{Id: "e", Ttl: durationpb.New(0)}, "ttl"},
		"negative ttl":  {&resealv1.CreateTokenRequest{Id: "e", Ttl: durationpb.New(-1)}, "ttl"},
		"long ttl":      {&resealv1.CreateTokenRequest{Id: "e", Ttl: durationpb.New(maxTokenTTL + 1)}, "ttl"},
		"malformed ttl": {&resealv1.CreateTokenRequest{Id: "e", Ttl: &durationpb.Duration{Seconds: 1, Nanos: -1}}, "ttl"},
		"many labels":   {&resealv1.CreateTokenRequest{Id: "e", Labels: many}, "labels"},
		"empty key":     {&resealv1.CreateTokenRequest{Id: "e", Labels: map[string]string{"": "x"}}, "labels"},
		"long value":    {&resealv1.CreateTokenRequest{Id: "e", Labels: map[string]string{"a": strings.Repeat("a", 254)}}, "labels"},
		"control":       {&resealv1.CreateTokenRequest{Id: "e", Labels: map[string]string{"a": "\n"}}, "labels"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.admin(t).CreateToken(t.Context(), c.req)
			wantCode(t, err, codes.InvalidArgument, c.field)
			if len(status.Convert(err).Details()) != 1 {
				t.Error("no field violation")
			}
		})
	}
	created, err := s.admin(t).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "e"})
	if err != nil {
		t.Fatal(err)
	}
	if ttl := created.GetInfo().GetExpiresAt().AsTime().Sub(created.GetInfo().GetCreatedAt().AsTime()); ttl != time.Hour {
		t.Errorf("default ttl is %s", ttl)
	}
}

func TestListAndRevoke(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	admin := s.admin(t)
	ids := map[string]string{}
	for _, edge := range []string{"c", "a", "b"} {
		ids[edge] = createToken(t, s, edge).GetInfo().GetTokenId()
	}
	listed := func() (edges []string) {
		list, err := admin.ListTokens(t.Context(), &resealv1.ListTokensRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, token := range list.GetTokens() {
			edges = append(edges, token.GetEdge())
			if token.GetTokenId() != ids[token.GetEdge()] || token.GetCreatedBy() != "admin/root" || token.GetLabels()["zone"] != "a" {
				t.Errorf("wrong entry %v", token)
			}
		}
		return edges
	}
	if got := listed(); cmp.Diff(got, []string{"a", "b", "c"}) != "" {
		t.Errorf("listed %v", got)
	}
	if _, err := admin.RevokeToken(t.Context(), &resealv1.RevokeTokenRequest{TokenId: ids["b"]}); err != nil {
		t.Fatal(err)
	}
	if got := listed(); cmp.Diff(got, []string{"a", "c"}) != "" {
		t.Errorf("after revoking b: %v", got)
	}
	for _, id := range []string{ids["b"], "", "x", "../ca", strings.Repeat("0", 16)} {
		_, err := admin.RevokeToken(t.Context(), &resealv1.RevokeTokenRequest{TokenId: id})
		wantCode(t, err, codes.NotFound)
	}
}

func TestRepeatWindow(t *testing.T) {
	now := time.Now()
	token := joinToken{ExpiresAt: now.Add(-time.Hour), UsedAt: now, UsedKey: []byte("key")}
	for _, c := range []struct {
		after time.Duration
		key   string
		want  bool
	}{{0, "key", true}, {repeatWindow - 1, "key", true}, {repeatWindow, "key", false}, {0, "kez", false}, {0, "", false}} {
		if got := token.repeats(now.Add(c.after), []byte(c.key)); got != c.want {
			t.Errorf("after %s with %q: %v", c.after, c.key, got)
		}
	}
	if token.open(now) || (&joinToken{}).repeats(now, nil) {
		t.Error("used and unused are mixed up")
	}
}

func FuzzParseCredential(f *testing.F) {
	hash := strings.Repeat("ab", 32)
	f.Add(newCredential().text(hash))
	f.Add("..")
	f.Add(hash + ".0000000000000000.")
	f.Fuzz(func(t *testing.T, text string) {
		c, ok := parseCredential(text, hash)
		if !ok {
			return
		}
		if again, ok := parseCredential(c.text(hash), hash); !ok || again.id != c.id || !bytes.Equal(again.secret, c.secret) {
			t.Fatalf("%q does not come back", text)
		}
	})
}

func TestFailuresAreLimited(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	anonymous := s.enrollment(t)
	good := createToken(t, s, "e").GetToken()
	enrol := func(token string) error {
		_, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: token, Id: "e", CertificateRequest: newRequest(t, newKey(t))})
		return err
	}
	slow := func(burst int) {
		s.trust.guesses = newGuesses()
		s.trust.guesses.sources[netip.MustParsePrefix("127.0.0.1/32")] = rate.NewLimiter(0, burst)
	}
	slow(10)
	refused := 0
	for range 30 {
		switch err := enrol(newCredential().text(s.trust.CAHash())); status.Code(err) {
		case codes.PermissionDenied:
			refused++
		case codes.ResourceExhausted:
		default:
			t.Fatal(err)
		}
	}
	if refused != 10 {
		t.Errorf("%d failures were looked at, want 10", refused)
	}
	// A token that is good is taken all the same.
	if err := enrol(good); err != nil {
		t.Error(err)
	}
	slow(1)
	for range 3 {
		// Successes don't count.
		if err := enrol(createToken(t, s, "e").GetToken()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestManySources: the table of addresses stays bounded, and one address does not
// shut out another.
func TestManySources(t *testing.T) {
	g := newGuesses()
	g.all = rate.NewLimiter(rate.Inf, 1)
	rogue := netip.MustParsePrefix("2001:db8::/64")
	for range failuresBurst {
		if !g.allow(rogue) {
			t.Fatal("the burst is smaller than it should be")
		}
	}
	allowed := 0
	for range 100 {
		if g.allow(rogue) {
			allowed++
		}
	}
	if allowed > 20 {
		t.Errorf("%d of 100 more were allowed", allowed)
	}
	for i := range 3 * maxSources {
		if !g.allow(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)) {
			t.Fatalf("address %d is shut out", i)
		}
	}
	if len(g.sources) > maxSources {
		t.Errorf("%d addresses are remembered", len(g.sources))
	}
}
