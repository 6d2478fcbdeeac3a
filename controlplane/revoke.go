package controlplane

import (
	"context"
	"net/http"
	"slices"

	"github.com/reseal/reseal/controlplane/trust"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// cutOff does what else a revocation means, besides that the caller is refused.
func (c *ControlPlane) cutOff(who trust.Identity) {
	if who.Role == resealv1.Role_ROLE_EDGE {
		c.sessions.Revoke(who.Name)
	}
}

// heldKeys are the ticket keys that an edge holds, and what it costs to revoke them.
// One that is not connected may have all that its labels select.
func (c *ControlPlane) heldKeys(ctx context.Context, edge string, labels map[string]string) []*resealv1.HeldKeys {
	all, err := c.keyring.Status(ctx, &resealv1.StatusRequest{})
	if err != nil {
		c.cfg.Logger.Warn("it is not known which ticket keys a revoked edge held", "edge", edge, "error", err)
		return nil
	}
	var keys []*resealv1.HeldKeys
	for _, k := range all.GetKeyrings() {
		epochs := c.heldEpochs(k, edge, labels)
		if len(epochs) == 0 {
			continue
		}
		held := &resealv1.HeldKeys{Keyring: k.GetName(), Epochs: epochs}
		cost, err := c.keyring.Revoke(ctx, &resealv1.RevokeRequest{Keyring: held.GetKeyring(), Epochs: epochs, DryRun: true})
		if err == nil { // else it changed just now, and what it costs is said when it is revoked
			held.TicketAge = cost.GetTicketAge()
		}
		keys = append(keys, held)
	}
	return keys
}

func (c *ControlPlane) heldEpochs(k *resealv1.KeyringStatus, edge string, labels map[string]string) []uint64 {
	var epochs []uint64
	for _, e := range k.GetEpochs() {
		epochs = append(epochs, e.GetNumber())
	}
	for _, cover := range k.GetEdges() {
		if cover.GetEdge() == edge {
			return slices.DeleteFunc(epochs, func(n uint64) bool { return !slices.Contains(cover.GetEpochs(), n) })
		}
	}
	resource := c.store.Snapshot().Get("Keyring", k.GetName())
	if labels != nil && !resource.GetKeyring().GetEdgeSelector().Selects(labels) {
		return nil
	}
	return epochs
}

// admitted refuses those whose certificate was revoked since they connected. Who
// connects is looked at in the handshake.
func (c *ControlPlane) admitted(page http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			if err := c.trust.CheckRevoked(r.TLS.PeerCertificates[0]); err != nil {
				http.Error(w, "the client certificate was revoked", http.StatusUnauthorized)
				return
			}
		}
		page.ServeHTTP(w, r)
	})
}
