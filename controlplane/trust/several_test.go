package trust

import (
	"crypto/tls"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// createTokenFor makes a token for several edges.
func createTokenFor(t *testing.T, s *server, pattern string, uses uint32) *resealv1.CreateTokenResponse {
	t.Helper()
	token, err := s.admin(t).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: pattern, Uses: uses, Labels: map[string]string{"team": "shop"}})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// TestTokenForSeveral: as many edges as it says enrol with it, if their ids match and
// are new. None takes the place of another, not even of one that was revoked.
func TestTokenForSeveral(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	created := createTokenFor(t, s, "shop-*", 2)
	if left := created.GetInfo().GetUsesLeft(); left != 2 || created.GetInfo().GetEdge() != "shop-*" {
		t.Errorf("made %v", created.GetInfo())
	}
	request := func(id string) *resealv1.EnrollRequest {
		return &resealv1.EnrollRequest{Token: created.GetToken(), Id: id, CertificateRequest: newRequest(t, newKey(t))}
	}
	for id, code := range map[string]codes.Code{"shop": codes.InvalidArgument, "other-1": codes.InvalidArgument, "shop-*": codes.InvalidArgument, "": codes.InvalidArgument} {
		_, err := s.enrollment(t).Enroll(t.Context(), request(id))
		wantCode(t, err, code, "shop-*")
	}
	key := newKey(t)
	first := &resealv1.EnrollRequest{Token: created.GetToken(), Id: "shop-1", CertificateRequest: newRequest(t, key)}
	answer, err := s.enrollment(t).Enroll(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	certificate := parsePEM(t, answer.GetCertificatePem())
	if certificate.URIs[0].String() != "spiffe://reseal/edge/shop-1" {
		t.Errorf("it is for %v", certificate.URIs)
	}
	_, err = s.enrollment(t).Enroll(t.Context(), request("shop-1"))
	wantCode(t, err, codes.AlreadyExists, "resealctl token create --id shop-1")
	if _, err := s.enrollment(t).Enroll(t.Context(), request("shop-2")); err != nil {
		t.Error(err)
	}
	_, err = s.enrollment(t).Enroll(t.Context(), request("shop-3"))
	wantCode(t, err, codes.PermissionDenied)
	list, err := s.admin(t).ListTokens(t.Context(), &resealv1.ListTokensRequest{})
	if err != nil || len(list.GetTokens()) != 0 {
		t.Errorf("there are %v, %v", list.GetTokens(), err)
	}
	// An answer that was lost is asked for again, also with the last use taken.
	if answer, err = s.enrollment(t).Enroll(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	again := parsePEM(t, answer.GetCertificatePem())
	if id, labels, err := s.trust.Edge(as("shop-1", again)); id != "shop-1" || labels["team"] != "shop" || err != nil {
		t.Errorf("%q, %v, %v", id, labels, err)
	}
	edge := s.enrollment(t, tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key})
	if _, err := edge.Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: newRequest(t, newKey(t))}); err != nil {
		t.Errorf("renew: %v", err)
	}

	// What was revoked stays so when the same token enrols the id again.
	created = createTokenFor(t, s, "*", 10)
	first = request("shop-9")
	if answer, err = s.enrollment(t).Enroll(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	stolen := parsePEM(t, answer.GetCertificatePem())
	if _, err := s.admin(t).RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "shop-9"}); err != nil {
		t.Fatal(err)
	}
	if answer, err = s.enrollment(t).Enroll(t.Context(), request("shop-9")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, s.trust.refused(caller{Identity{resealv1.Role_ROLE_EDGE, "shop-9"}, stolen}), codes.Unauthenticated, "revoked")
	if err := s.trust.refused(caller{Identity{resealv1.Role_ROLE_EDGE, "shop-9"}, parsePEM(t, answer.GetCertificatePem())}); err != nil {
		t.Error(err)
	}
}

// TestTokenForSeveralAtOnce: no use is taken twice, and none is lost.
func TestTokenForSeveralAtOnce(t *testing.T) {
	cfg := testConfig(t)
	servers := []*server{serve(t, openTrust(t, cfg), true), serve(t, openTrust(t, cfg), true)}
	token := createTokenFor(t, servers[0], "e*", 20).GetToken()
	var all sync.WaitGroup
	var good, refused atomic.Int32
	for i := range 30 {
		client, request := servers[i%2].enrollment(t), newRequest(t, newKey(t))
		all.Go(func() {
			_, err := client.Enroll(t.Context(), &resealv1.EnrollRequest{Token: token, Id: fmt.Sprint("e", i), CertificateRequest: request})
			switch status.Code(err) {
			case codes.OK:
				good.Add(1)
			case codes.PermissionDenied:
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if good.Load() != 20 || refused.Load() != 10 {
		t.Errorf("%d enrolled, %d were refused", good.Load(), refused.Load())
	}
}

func TestBadTokensForSeveral(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	for name, request := range map[string]*resealv1.CreateTokenRequest{
		"uses of one edge": {Id: "e1", Uses: 2},
		"too many uses":    {Id: "e*", Uses: maxUses + 1},
		"bad pattern":      {Id: "e[*"},
		"a long one":       {Id: fmt.Sprintf("%064d*", 0)},
	} {
		_, err := s.admin(t).CreateToken(t.Context(), request)
		if wantCode(t, err, codes.InvalidArgument); t.Failed() {
			t.Fatal(name)
		}
	}
}
